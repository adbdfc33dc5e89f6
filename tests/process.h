// process - tq as a running process: what it says is awaited, signals are sent to it. A run that is
// only waited for is run_tq() of cli.h.
#pragma once

#include <gtest/gtest.h>
#include <sys/ioctl.h>
#include <termios.h>

#include <csignal>
#include <cstdlib>
#include <utility>

#include "tests/cli.h"

namespace tq {

struct ProcessOptions {
  bool open_stdin = false;  // a pipe into which nobody writes
  int ignored_signal = 0;   // as nohup leaves SIGHUP
};

// tq with pipes on stdout and stderr, or on a terminal of its own.
class Process {
 public:
  explicit Process(const Args& args, bool terminal = false, const ProcessOptions& options = {}) {
    int out[2] = {-1, -1};
    if (terminal) {
      out[0] = ::posix_openpt(O_RDWR | O_NOCTTY);
      EXPECT_EQ(::grantpt(out[0]) + ::unlockpt(out[0]), 0);
    } else {
      EXPECT_EQ(::pipe(out), 0);
    }
    const std::string name = terminal ? ::ptsname(out[0]) : "";
    int in[2] = {-1, -1};
    if (options.open_stdin && ::pipe(in) != 0) ADD_FAILURE() << "no pipe";
    child_ = ::fork();
    if (child_ == 0) {
      if (options.ignored_signal) ::signal(options.ignored_signal, SIG_IGN);
      if (options.open_stdin) {
        ::dup2(in[0], 0);
        ::close(in[1]);
      }
      if (terminal) {
        ::setsid();
        out[1] = ::open(name.c_str(), O_RDWR);
        ::ioctl(out[1], TIOCSCTTY, 0);
        ::dup2(out[1], 0);
      }
      ::dup2(out[1], 1);
      ::dup2(out[1], 2);
      ::close(out[0]);
      std::vector<char*> argv = {const_cast<char*>(TQ_BINARY)};
      for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
      argv.push_back(nullptr);
      ::execv(TQ_BINARY, argv.data());
      ::_exit(127);
    }
    if (!terminal) ::close(out[1]);
    if (options.open_stdin) ::close(in[0]);
    stdin_ = in[1];
    fd_ = out[0];
  }
  ~Process() {
    close_output();
    if (stdin_ >= 0) ::close(stdin_);
    if (child_ <= 0) return;
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
  }

  // Reads until `text` has come; false at the end of the output. `before`: what came in front of
  // it.
  bool wait_for(const std::string& text, std::string* before = nullptr) {
    while (unread_.find(text) == std::string::npos) {
      char buffer[4096];
      const ssize_t n = ::read(fd_, buffer, sizeof buffer);
      if (n <= 0) return false;
      unread_.append(buffer, static_cast<size_t>(n));
    }
    if (before) *before = unread_.substr(0, unread_.find(text));
    unread_.erase(0, unread_.find(text) + text.size());
    return true;
  }
  void type(const std::string& text) {
    for (size_t done = 0; done < text.size();) {  // a terminal takes a few kilobytes at a time
      const ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
      ASSERT_GT(n, 0);
      done += static_cast<size_t>(n);
    }
  }
  // Whether the terminal reads whole lines and echoes, as a shell expects it.
  bool line_mode() const {
    termios mode = {};
    EXPECT_EQ(::tcgetattr(fd_, &mode), 0);
    return (mode.c_lflag & ICANON) && (mode.c_lflag & ECHO);
  }
  // The exit code, 128 + signal when killed; the output stays open.
  int wait_exit() {
    int status = 0;
    ::waitpid(std::exchange(child_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  void send(int signal) { ::kill(child_, signal); }
  void close_output() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }
  // The rest of the output and the exit code, 128 + signal when killed.
  int finish(std::string* rest = nullptr) {
    while (fd_ >= 0 && wait_for("\n")) {
    }
    if (rest) *rest = unread_;
    return wait_exit();
  }

 private:
  pid_t child_ = -1;
  int fd_ = -1, stdin_ = -1;
  std::string unread_;
};

// Enough text for GPTQ to work some tenths of a second on every layer of stories260k.
inline Args slow_quantize(const TempDir& dir) {
  std::string text;
  while (text.size() < 120'000) text += "Once upon a time, there was a little girl named Lily. ";
  write_bytes(dir / "calib.txt", text);
  return {"quantize",
          copy_model(dir),
          "-o",
          dir / "m.tq",
          "--method",
          "gptq",
          "--group",
          "32",
          "--calib",
          dir / "calib.txt",
          "--calib-length",
          "256",
          "--calib-samples",
          "120",
          "--threads",
          "1"};
}

}  // namespace tq
