// last_resort - see last_resort.h.
#include "tools/last_resort.h"

#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>

#include "model/atomic_file.h"
#include "model/error.h"
#include "tools/turn_reader.h"

namespace tq {
namespace {

// Half a second is what a user waits before pressing again.
constexpr suseconds_t kGraceMicroseconds = 350'000;
constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP};

volatile std::sig_atomic_t g_signal = 0;
volatile std::sig_atomic_t g_ends_at_once = 0;
// What end_interrupted() says; a literal.
const char* volatile g_interrupted_line = "tq: error: interrupted (signal): stopped\n";
std::atomic<bool> g_result_is_out{false};
std::atomic_flag g_ending = ATOMIC_FLAG_INIT;

// Only what a signal handler may call.
[[noreturn]] void end_now(ErrorKind kind, const char* line) {
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, nullptr);
  while (g_ending.test_and_set()) pause();  // another thread is here already
  restore_terminal();
  remove_unfinished_files();
  // A line may be open on a terminal: progress, or the answer of a model.
  if (isatty(STDERR_FILENO)) static_cast<void>(!::write(STDERR_FILENO, "\n", 1));
  for (size_t left = std::strlen(line); left > 0;) {
    const ssize_t n = ::write(STDERR_FILENO, line, left);
    if (n <= 0) break;
    line += n;
    left -= static_cast<size_t>(n);
  }
  ::_exit(static_cast<int>(kind));
}

[[noreturn]] void end_interrupted() {
  end_now(ErrorKind::kInterrupted, g_interrupted_line);
}

void on_alarm(int) {
  if (g_signal) end_interrupted();
}

// SIGALRM belongs to whoever started us until a signal came.
void set_alarm(suseconds_t microseconds) {
  if (microseconds > 0) {
    struct sigaction action = {};
    action.sa_handler = on_alarm;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(SIGALRM, &action, nullptr);
    sigset_t alarm;
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &alarm, nullptr);
  }
  const itimerval timer = {{0, 0}, {0, microseconds}};
  setitimer(ITIMER_REAL, &timer, nullptr);
}

void on_signal(int signal) {
  if (g_signal || g_ends_at_once) end_interrupted();
  g_signal = signal;
  const int saved = errno;
  set_alarm(kGraceMicroseconds);
  errno = saved;
}

// Called by operator new, in any thread, also where an exception could not leave (a destructor, a
// noexcept function, a library that swallows it) and before main(). Unwinding would allocate again.
[[noreturn]] void on_no_memory() {
  if (g_result_is_out) ::_exit(0);
  end_now(ErrorKind::kResource,
          "tq: error: out of memory (host): an allocation failed; lower --ctx or free memory\n");
}

[[noreturn]] void on_terminate() {
  try {
    if (std::current_exception()) throw;
  } catch (const Error& error) {
    end_now(error.kind(), "tq: error: failed (tq): an error could not be reported\n");
  } catch (const std::bad_alloc&) {
    on_no_memory();
  } catch (...) {
  }
  end_now(ErrorKind::kInternal,
          "tq: error: internal error (tq): an exception was not caught; please report it\n");
}

// Before main() only initialisers run, and those of the CUDA runtime use memory that they did not
// get.
void on_early_fault(int) {
  end_now(ErrorKind::kResource, "tq: error: out of memory (host): the program could not start\n");
}

// Before the initialisers of this program's other objects, which allocate too.
__attribute__((constructor(101))) void install_handlers() {
  std::signal(SIGSEGV, on_early_fault);
  std::set_new_handler(on_no_memory);
  std::set_terminate(on_terminate);
}

}  // namespace

void install_signal_handler() {
  std::signal(SIGSEGV, SIG_DFL);  // from here on it would be a bug
  struct sigaction action = {}, inherited = {};
  action.sa_handler = on_signal;
  // No call fails with EINTR: what blocks is ended by the alarm.
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  for (int signal : kSignals) {
    sigaction(signal, nullptr, &inherited);
    if (inherited.sa_handler != SIG_IGN) sigaction(signal, &action, nullptr);
  }
}

bool interrupted() {
  return g_signal != 0;
}

bool forget_ctrl_c() {
  if (g_signal != SIGINT) return false;
  set_alarm(0);
  g_signal = 0;
  return true;
}

void check_interrupted() {
  if (interrupted()) throw Error(ErrorKind::kInterrupted, "interrupted", "signal", "stopped");
}

void say_work_is_kept() {
  g_interrupted_line =
      "tq: error: interrupted (tq quantize): finished work is kept in OUTPUT.resume; continue with "
      "--resume\n";
}

void result_is_out() {
  g_result_is_out = true;
}

void ignore_signals() {
  for (int signal : kSignals) std::signal(signal, SIG_IGN);
  set_alarm(0);
}

EndsAtOnce::EndsAtOnce() {
  g_ends_at_once = 1;
  // In this order a signal is either seen here or ends the process itself.
  if (g_signal) end_interrupted();
}

EndsAtOnce::~EndsAtOnce() {
  g_ends_at_once = 0;
}

}  // namespace tq
