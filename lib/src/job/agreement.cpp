// SPDX-License-Identifier: Apache-2.0
#include <annulus/job/agreement.hpp>

#include <algorithm>
#include <cstdint>

namespace annulus {

namespace {

/// FNV-1a, 64 bits.
std::int64_t hash_of(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const char letter : text) { hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3U; }
  return static_cast<std::int64_t>(hash);
}

/// What is compared. Lengths stand before the texts, which may hold any byte.
std::string packed(std::span<const Fact> facts) {
  std::string text;
  for (const Fact& fact : facts) { text += fmt::format("{} {} {}{}", fact.name.size(), fact.value.size(), fact.name, fact.value); }
  return text;
}

/// Of one fact, or of one that another rank has more. Values may be whole tables of a sweep: their beginning tells enough.
std::string shown(std::span<const Fact> entry) {
  if (entry.empty()) { return "nothing more"; }
  constexpr std::size_t kShown = 200;
  const auto& [name, value, note] = entry.front();
  return fmt::format("{} {}{}{}", name, value.substr(0, kShown), value.size() > kShown ? "..." : "", note.empty() ? "" : " (" + note + ")");
}

}  // namespace

void require_same(const Communicator& comm, std::span<const Fact> facts) {
  if (comm.size() == 1) { return; }
  const std::string own = packed(facts);
  const std::int64_t hash = hash_of(own);
  if (comm.min(hash) == comm.max(hash)) { return; }

  // Rank 0's list goes to all, entry by entry, so that the first difference from it can be found.
  const std::int64_t count = comm.max(static_cast<std::int64_t>(facts.size()));
  const std::string reference_name = comm.broadcast(comm.name(), 0);
  for (std::size_t index = 0; index < static_cast<std::size_t>(count); ++index) {
    const std::span<const Fact> entry = index < facts.size() ? facts.subspan(index, 1) : std::span<const Fact>();
    const std::string reference = comm.broadcast(packed(entry), 0);
    const std::string reference_shown = comm.broadcast(shown(entry), 0);
    together(comm, [&] {
      if (packed(entry) == reference) { return; }
      throw InvalidArgument(fmt::format("{} has {} and {} has {}; all ranks must be told the same", reference_name, reference_shown,
                                        comm.name(), shown(entry)));
    });
  }
}

}  // namespace annulus
