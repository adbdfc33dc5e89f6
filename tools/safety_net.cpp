// safety_net - see safety_net.h.
#include "tools/safety_net.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "model/atomic_file.h"
#include "model/error.h"
#include "model/input_file.h"

namespace tq {
namespace {

// Only what a signal handler may call: no allocation, no lock.
void say(const char* text) {
  for (size_t left = std::strlen(text); left > 0;) {
    const ssize_t n = ::write(STDERR_FILENO, text, left);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    text += n;
    left -= static_cast<size_t>(n);
  }
}

void on_bus_error(int signal, siginfo_t* info, void*) {
  const char* path = MappedFile::path_at(info->si_addr);
  if (!path) {  // not a file of ours: a bug, or broken memory
    ::signal(signal, SIG_DFL);
    ::raise(signal);
    return;
  }
  remove_unfinished_files();
  say("tq: error: cannot read file (");
  say(path);
  say("): it became shorter while it was read, or its disk failed; restore it and start again\n");
  ::_exit(static_cast<int>(ErrorKind::kIo));
}

}  // namespace

void hold_standard_descriptors() {
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; ++fd) {
    if (::fcntl(fd, F_GETFD) != -1 || errno != EBADF) continue;
    // The lowest free number, which is fd. Opened the wrong way round: results that nobody can
    // read must not look written.
    if (::open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd) {
      ::_exit(static_cast<int>(ErrorKind::kIo));
    }
  }
}

void install_fatal_handlers() {
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
  ::signal(SIGXFSZ, SIG_IGN);
}

}  // namespace tq
