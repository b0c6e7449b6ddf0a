// SPDX-License-Identifier: Apache-2.0
// The first thing ranks say to each other, so that programs of different versions know each other before anything else is exchanged.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace annulus {

/// What every rank sends first. No version may change these 64 bytes or the call that exchanges them, an all-gather over all processes
/// of the job: "annulus" and a NUL, then the version in 24 bytes and the state of git in 32. Both are text, which has no byte order, cut
/// to what fits and padded with NUL.
using Greeting = std::array<char, 64>;

Greeting greeting_of(std::string_view version, std::string_view git);

/// Which rank differs from rank 0, and what both run; nothing if all are alike. greetings[i] is rank i's.
std::optional<std::string> difference_of(std::span<const Greeting> greetings);

}  // namespace annulus
