// SPDX-License-Identifier: Apache-2.0
// What the kernels on host memory ask of a task before they trust its addresses.
#pragma once

#include <annulus/kernels/tasks.hpp>

namespace annulus {

/// @throws InvalidArgument naming the extent or operand that a kernel cannot take
void check_task(const kernels::ZeroKeysTask& task);
void check_task(const kernels::AttendTask& task);
void check_task(const kernels::FinishTask& task);
void check_task(const kernels::BeginGradientsTask& task);
void check_task(const kernels::GradientTask& task);

}  // namespace annulus
