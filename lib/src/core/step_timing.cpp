// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/step_timing.hpp>

#include <algorithm>
#include <cstddef>
#include <string>

namespace annulus {

StepColumns step_columns(std::span<const std::vector<StepTiming>> timings) {
  std::size_t steps = 0;
  for (const auto& rank : timings) { steps = std::max(steps, rank.size()); }
  StepColumns table{std::ssize(timings), static_cast<std::int64_t>(steps), {}};
  for (const StepNumber& number : kStepNumbers) {
    std::visit(
        [&]<class Number>(Number StepTiming::* field) {
          std::vector<Number> values(timings.size() * steps, StepTiming{}.*field);
          for (std::size_t rank = 0; rank < timings.size(); ++rank) {
            for (std::size_t step = 0; step < timings[rank].size(); ++step) { values[rank * steps + step] = timings[rank][step].*field; }
          }
          table.columns.push_back({std::string(number.name), std::move(values)});
        },
        number.field);
  }
  return table;
}

}  // namespace annulus
