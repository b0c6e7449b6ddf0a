// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/config.hpp>
#include <annulus/job/communicator.hpp>
#include <annulus/plan/machine.hpp>

namespace annulus {

/// Measures the constants of the machine that the job runs on, all ranks at work together, as in a run: block rates of the configured
/// dtype, head_dim and heads by rows and mask, copies, links inside a host and between hosts as far as the job has them, and the launch
/// gap. The slowest rank counts; medians of several. Backend, kernel, transport and threads are those of the configuration. Collective.
/// @throws AgreedError as resolve() and Session
Machine calibrate(const Config& asked, const Communicator& comm);

}  // namespace annulus
