// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace annulus::app {

/// From here on every signal that ends a process by default first removes unfinished files, and then ends it as by default, unless
/// take_stop_signal() takes it as the wish to stop. One that the
/// parent has set to be ignored stays ignored (nohup, a job in the background), and a handler that is there already stays too.
/// Signals that say that this program is broken (SIGSEGV and its kind) are left alone. SIGXFSZ is ignored: a file-size limit then is an
/// error that names the file.
void tidy_up_on_signals();

}  // namespace annulus::app
