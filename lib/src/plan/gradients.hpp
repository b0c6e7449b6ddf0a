// SPDX-License-Identifier: Apache-2.0
// The backward pass of a rank.
#pragma once

#include "layout.hpp"

#include <cstdint>

namespace annulus::planning {

/// Adds the steps of the backward pass to `layout`, which holds those of the forward one, from step `first` on: blocks make the hops of
/// `routes` again, a block that came in step s of them in step first + s, where all queries meet it. What they give to its dK and dV leaves
/// in step first + s + 2, to where the block went, or home.
void add_gradients(const Setting& setting, const Routes& routes, Layout& layout, std::int64_t first);

}  // namespace annulus::planning
