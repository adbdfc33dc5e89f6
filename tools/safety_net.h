// safety_net - what the process needs before any command: descriptors 0 to 2, and the fatal signals
// that have an ordinary cause. Ctrl-C is in runtime.h.
#pragma once

namespace tq {

/// Gives the descriptors 0 to 2 that are closed to /dev/null, so that no file we open gets their
/// number and with it the lines meant for stderr. Reading and writing them still fails. Call first.
void hold_standard_descriptors();

/// SIGBUS, where a mapped file became shorter: one line, temporary files removed, exit code 5.
/// SIGXFSZ is ignored, so that a write beyond the limit of file sizes fails like any other.
void install_fatal_handlers();

}  // namespace tq
