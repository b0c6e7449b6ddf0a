// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace annulus {

/// What must be done before the process ends without unwinding. Async-signal-safe.
using AbortHook = void (*)() noexcept;

/// Has `hook` called by run_abort_hooks(), once however often it is registered. At most 4 different ones.
void at_abort(AbortHook hook);

/// Calls what at_abort() was given. Called by whoever aborts the job, on any thread; async-signal-safe.
void run_abort_hooks() noexcept;

}  // namespace annulus
