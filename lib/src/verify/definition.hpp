// SPDX-License-Identifier: Apache-2.0
// The operator's definition, for one token.
#pragma once

#include <annulus/core/problem.hpp>

#include <cstdint>

namespace annulus {

bool head_runs_branch(const Problem& problem, const Pattern& pattern, std::int64_t branch, std::int64_t head);

std::int64_t offset_of(const Problem& problem, const Pattern& pattern, std::int64_t branch, std::int64_t segment, std::int64_t head);

/// Whether a token is one of the rows of a segment of `branch` at this offset.
bool is_selected(const Problem& problem, const Pattern& pattern, const Branch& branch, std::int64_t segment, std::int64_t offset,
                 std::int64_t token);

/// Slots that a whole segment has at this offset, and this one has no token for: keys of zeros, after all others.
std::int64_t zero_slots(const Problem& problem, const Pattern& pattern, const Branch& branch, std::int64_t segment, std::int64_t offset);

/// Whether a query of a batch entry must not see a key. Once a key is masked, all later ones are.
bool is_masked(const Problem& problem, std::int64_t batch, std::int64_t query, std::int64_t key);

}  // namespace annulus
