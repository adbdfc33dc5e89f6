// last_resort - how tq ends where nothing can be unwound: a signal that nobody answers, memory that
// ran out, an exception that nobody caught. Always one line, and no temporary file stays.
//
// The usual way to end is an Error that main() catches. Here nothing allocates and nothing waits.
#pragma once

namespace tq {

/// SIGINT, SIGTERM and SIGHUP make interrupted() true; what looks at it stops at the next good
/// place. Whatever does not stop within about a third of a second (a read, a library, a long loop)
/// ends with exit code 130. The second signal ends at once. A signal that was ignored when tq
/// started stays ignored: nohup, background jobs.
void install_signal_handler();
bool interrupted();
/// Forgets a Ctrl-C, so that work may go on. False if the signal was another one.
bool forget_ctrl_c();
/// Throws kInterrupted if a signal arrived.
void check_interrupted();
/// From now on the line of an interruption names --resume.
void say_work_is_kept();
/// From now on memory that runs out ends the process with exit code 0: the result is delivered.
void result_is_out();
/// From now on no signal ends the process: its last line is being printed.
void ignore_signals();

/// While one lives, the first signal ends the process at once: for waiting on somebody's input,
/// where there is nothing to finish.
class EndsAtOnce {
 public:
  EndsAtOnce();
  ~EndsAtOnce();
  EndsAtOnce(const EndsAtOnce&) = delete;
};

}  // namespace tq
