// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/job/communicator.hpp>

#include <span>
#include <string>

namespace annulus {

/// Something that all ranks must have alike.
struct Fact {
  std::string name;       ///< for messages: "seq-len"
  std::string value;      ///< as text; what is compared, byte for byte
  std::string note = {};  ///< shown behind the value and not compared
};

/// Requires that all ranks have the same facts, names as well as values, in the same order. Where they are alike, which is nearly always,
/// this costs two reductions of 8 bytes, however many facts there are. Collective.
/// @throws AgreedError that names the first fact that differs from rank 0's, the lowest rank that differs in it, and both values
void require_same(const Communicator& comm, std::span<const Fact> facts);

}  // namespace annulus
