// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/plan/machine.hpp>
#include <annulus/plan/plan.hpp>

namespace annulus::planning {

// What the ops of a plan take on a machine, in milliseconds. A copy of n bytes reads and writes n; what only reads or only writes takes
// half.

/// Partials made empty; nothing where the machine has times of partials, which hold that.
double begin_ms(const RingPlan& plan, const Machine& machine);

double pack_ms(const Step& step, const RingPlan& plan, const Machine& machine);

/// Wave after wave: a launch gap, and the arithmetic of the items at the rate of their rows, as long as the lanes that have a tile more
/// than others take. A block of q query and k key rows counts as one of 2qk / (q + k) rows each, which costs as much where the cost besides
/// arithmetic grows with rows of either kind alike.
double attend_ms(const Step& step, const RingPlan& plan, const Machine& machine);

/// Partials read, O and LSE written; by the machine's times of partials if it has any.
double finish_ms(const RingPlan& plan, const Machine& machine);

}  // namespace annulus::planning
