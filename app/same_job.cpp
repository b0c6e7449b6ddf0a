// SPDX-License-Identifier: Apache-2.0
#include "same_job.hpp"

#include <annulus/job/agreement.hpp>

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

namespace annulus::app {

namespace {

/// Ranks may differ in these: results do not depend on the number of threads, and hosts have different ones; each rank's patience is its
/// own, and the shortest acts first. (--json is no option of this table: rank 0 alone prints.)
constexpr std::array<std::string_view, 2> kFree{"threads", "timeout"};

/// Computing commands compare these once the input has filled them in: a rank may name what another takes from the file or by default, and
/// the file itself may be a copy under another name.
constexpr std::array<std::string_view, 16> kResolved{
    "batch",          "seq-len", "heads",       "kv-heads",   "head-dim",   "dtype",      "scale",        "segment-lengths",
    "dilation-rates", "input",   "layer.embed", "layer.kdim", "layer.vdim", "layer.bias", "layer.rotary", "layer.rotary-base"};

bool contains(std::span<const std::string_view> names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

void require_same_invocation(const Invocation& invocation, const Communicator& comm) {
  const Command command = invocation.command;
  std::vector<Fact> facts{{"the command", std::string(to_string(command))}};
  const bool computes = command == Command::run || command == Command::check || command == Command::bench;
  for (const Option& option : options()) {
    if (contains(kFree, option.name) || (computes && contains(kResolved, option.name))) { continue; }
    Value value;
    const bool set = option.get(invocation.config, value);
    facts.push_back({std::string(option.name), set ? text_of(value) : "not given"});
  }
  require_same(comm, facts);
}

}  // namespace annulus::app
