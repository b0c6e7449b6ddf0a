// SPDX-License-Identifier: Apache-2.0
#include "result_text.hpp"

#include <annulus/core/error.hpp>
#include <annulus/io/result_contents.hpp>

#include "report.hpp"

#include <fmt/chrono.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <ctime>

namespace annulus::app {

namespace {

Json to_json(const ResultContents& contents) {
  Json json{{"datasets", Json::array()}, {"provenance", Json::object()}, {"parts", Json::object()}};
  for (const auto& [name, extents, dtype] : contents.datasets) {
    json["datasets"].push_back({{"name", name}, {"extents", extents}, {"dtype", dtype}});
  }
  for (const auto& [name, value] : contents.provenance) { json["provenance"][name] = value; }
  for (const NamedColumn& column : contents.parts) {
    std::visit([&](const auto& values) { json["parts"][column.name] = values; }, column.values);
  }
  return json;
}

/// A column of /parts; null if there is none of this name and type.
template <class Value>
const std::vector<Value>* part_column(const ResultContents& contents, const std::string& name) {
  const auto found = std::ranges::find(contents.parts, name, &NamedColumn::name);
  return found == contents.parts.end() ? nullptr : std::get_if<std::vector<Value>>(&found->values);
}

std::string parts_text(const ResultContents& contents) {
  const auto* const complete = part_column<std::int64_t>(contents, "complete");
  const auto* const first = part_column<std::int64_t>(contents, "first_entry");
  const auto* const entries = part_column<std::int64_t>(contents, "entries");
  const auto* const finished = part_column<std::int64_t>(contents, "finished_at");
  const auto* const ms = part_column<double>(contents, "total_ms");
  const auto* const tflops = part_column<double>(contents, "tflops");
  const auto* const memory = part_column<std::int64_t>(contents, "memory_high_water");
  const auto* const taken = part_column<std::int64_t>(contents, "allocations_taken");
  const auto* const reused = part_column<std::int64_t>(contents, "allocations_reused");
  const auto* const made = part_column<std::int64_t>(contents, "plans_made");
  const auto* const found = part_column<std::int64_t>(contents, "plans_found");
  const auto* const host = part_column<std::string>(contents, "host");
  if (complete == nullptr || first == nullptr || entries == nullptr || finished == nullptr || ms == nullptr || tflops == nullptr ||
      memory == nullptr || taken == nullptr || reused == nullptr || made == nullptr || found == nullptr || host == nullptr) {
    return {};
  }
  // Allocations: of the system, and of what a pool had kept. Plans: made, and found.
  std::string text = fmt::format("\nparts: {} of {} complete\n{:>6} {:>8} {:>8} {:>12} {:>10} {:>12} {:>12} {:>10}  {:<20}  {}\n",
                                 complete->size() - static_cast<std::size_t>(std::ranges::count(*complete, 0)), complete->size(), "part",
                                 "entry", "entries", "ms", "TFLOP/s", "memory", "taken/reused", "plans", "finished", "host");
  for (std::size_t part = 0; part < complete->size(); ++part) {
    text += fmt::format("{:>6} {:>8} {:>8} ", part + 1, (*first)[part], (*entries)[part]);
    if ((*complete)[part] == 0) {
      text += "left to do\n";
      continue;
    }
    text += fmt::format("{:>12.3f} {:>10.4g} {:>12} {:>12} {:>10}  {:%Y-%m-%dT%H:%M:%SZ}  {}\n", (*ms)[part], (*tflops)[part],
                        human_bytes((*memory)[part]), fmt::format("{}/{}", (*taken)[part], (*reused)[part]),
                        fmt::format("{}+{}", (*made)[part], (*found)[part]), fmt::gmtime(static_cast<std::time_t>((*finished)[part])),
                        (*host)[part]);
  }
  return text;
}

}  // namespace

std::string result_text(const std::string& path, bool json) {
  const ResultContents contents = read_result_contents(path);
  if (json) { return to_json(contents).dump(2) + "\n"; }
  std::size_t width = 0;
  for (const auto& dataset : contents.datasets) { width = std::max(width, dataset.name.size()); }
  for (const auto& [name, value] : contents.provenance) { width = std::max(width, name.size()); }
  std::string text;
  for (const auto& [name, extents, dtype] : contents.datasets) {
    text += fmt::format("{:<{}}  [{}] {}\n", name, width, fmt::join(extents, ", "), dtype);
  }
  text += '\n';
  for (const auto& [name, value] : contents.provenance) {
    // Texts of several lines go on below their first.
    std::string indented;
    for (const char letter : value.substr(0, value.find_last_not_of('\n') + 1)) {
      indented += letter;
      if (letter == '\n') { indented.append(width + 2, ' '); }
    }
    text += fmt::format("{:<{}}  {}\n", name, width, indented);
  }
  return text + parts_text(contents);
}

}  // namespace annulus::app
