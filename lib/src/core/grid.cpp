// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/grid.hpp>

#include <annulus/core/error.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <set>
#include <utility>

namespace annulus {

namespace {

/// More ranks than any job has, and few enough that their products fit.
constexpr std::int64_t kMostParts = std::int64_t{1} << 20;

std::int64_t parts_from(std::string_view text, std::string_view entry) {
  std::int64_t parts = 0;
  const auto [end, status] = std::from_chars(entry.data(), entry.data() + entry.size(), parts);
  ANNULUS_EXPECTS(status == std::errc() && end == entry.data() + entry.size() && parts >= 1 && parts <= kMostParts,
                  "--grid '{}': '{}' is not a number in 1..{}", text, entry, kMostParts);
  return parts;
}

}  // namespace

Grid grid_from(std::string_view text) {
  Grid grid;
  if (text == "auto") {
    grid.automatic = true;
    return grid;
  }
  const std::array<std::pair<std::string_view, std::int64_t*>, 3> axes{
      {{"batch", &grid.batch}, {"heads", &grid.heads}, {"seq", &grid.seq}}};
  std::set<std::string_view> named;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    const std::string_view entry = text.substr(begin, comma - begin);
    const std::size_t equals = entry.find('=');
    const auto* const axis = std::find_if(axes.begin(), axes.end(), [&](const auto& one) { return one.first == entry.substr(0, equals); });
    ANNULUS_EXPECTS(equals != std::string_view::npos && axis != axes.end(), "--grid '{}': '{}' is not auto, batch=N, heads=N or seq=N",
                    text, entry);
    ANNULUS_EXPECTS(named.insert(axis->first).second, "--grid '{}' has {} twice", text, axis->first);
    *axis->second = parts_from(text, entry.substr(equals + 1));
    begin = comma + 1;
  }
  return grid;
}

std::string to_string(const Grid& grid) {
  if (grid.automatic) { return "auto"; }
  std::string text = fmt::format("batch={},heads={}", grid.batch, grid.heads);
  if (grid.seq > 0) { text += fmt::format(",seq={}", grid.seq); }
  return text;
}

}  // namespace annulus
