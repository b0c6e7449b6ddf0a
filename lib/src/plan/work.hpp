// SPDX-License-Identifier: Apache-2.0
// What a rank attends, and in which step.
#pragma once

#include "layout.hpp"

#include <cstdint>
#include <vector>

namespace annulus::planning {

/// Running partials of each row.
std::int64_t partials_of(const Setting& setting);

/// That of the extra keys alone, the last; -1 if there are no such keys, or they share that of all branches.
std::int64_t extra_partial_of(const Setting& setting);

/// Adds the work to the steps of `layout`: keys of the rank's own rows in step 0, all others when the routes say. Under
/// KeyOrder::cyclic, own rows above a query's block follow the segment's last block.
void add_work(const Setting& setting, const Routes& routes, Layout& layout);

/// Adds to the step `first` of `layout` all work on keys of the rank's own rows, and to the steps that `uses` name that on blocks, which
/// lie where layout.places says. Waves and partials are for others to number.
void add_items(const Setting& setting, const Routes& routes, std::int64_t first, const std::vector<Use>& uses, Layout& layout);

}  // namespace annulus::planning
