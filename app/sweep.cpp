// SPDX-License-Identifier: Apache-2.0
#include "sweep.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <iterator>
#include <string_view>

namespace annulus::app {

namespace {

/// A table of more rows is a mistake in a range.
constexpr std::size_t kMostRows = 10000;

/// BEGIN..END*FACTOR or BEGIN..END+STEP; both bounds are values of the option.
std::vector<Value> parse_range(const Option& option, std::string_view text) {
  constexpr std::string_view kForms = "BEGIN..END*FACTOR or BEGIN..END+STEP";
  const std::size_t dots = text.find("..");
  const std::size_t sign = text.find_first_of("*+", dots);
  ANNULUS_EXPECTS(sign != std::string_view::npos, "'{}' is not a range {}", text, kForms);
  const auto number = [&](std::string_view part) { return std::get<std::int64_t>(parse_value(option, part)); };
  const std::int64_t begin = number(text.substr(0, dots));
  const std::int64_t end = number(text.substr(dots + 2, sign - dots - 2));
  const std::int64_t by = number(text.substr(sign + 1));
  const bool multiplies = text[sign] == '*';
  ANNULUS_EXPECTS(begin <= end, "range '{}' begins above its end", text);
  ANNULUS_EXPECTS(multiplies ? by >= 2 && begin >= 1 : by >= 1, "range '{}' does not grow", text);
  std::vector<Value> values;
  for (std::int64_t value = begin;;) {
    values.emplace_back(value);
    ANNULUS_EXPECTS(values.size() <= kMostRows, "range '{}' has more than {} values", text, kMostRows);
    if (multiplies ? value > end / by : value > end - by) { return values; }
    value = multiplies ? value * by : value + by;
  }
}

const Option& sweepable(std::string_view key) {
  const Option* option = find_option(key);
  ANNULUS_EXPECTS(option != nullptr, "there is no option {}", key);
  const bool single = option->kind != ValueKind::integers && option->kind != ValueKind::counts && option->kind != ValueKind::texts;
  ANNULUS_EXPECTS(single, "{} holds a list; only options that hold a single value can be swept", key);
  const bool of_row = is_of_row(option->scope);
  // The watchdog is the job's and starts before the first row.
  ANNULUS_EXPECTS(of_row && key != "timeout", "{} is not an option of the problem, pattern or execution of a row", key);
  return *option;
}

SweepAxis parse_sweep(std::string_view text) {
  const std::size_t equals = text.find('=');
  ANNULUS_EXPECTS(equals != std::string_view::npos, "it is written KEY=VALUE,VALUE,...");
  const Option& option = sweepable(text.substr(0, equals));
  SweepAxis axis{&option, {}};
  const std::string_view list = text.substr(equals + 1);
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t comma = std::min(list.find(',', begin), list.size());
    const std::string_view part = list.substr(begin, comma - begin);
    ANNULUS_EXPECTS(!part.empty(), "the list has a hole");
    if (option.kind == ValueKind::integer && part.find("..") != std::string_view::npos) {
      std::ranges::copy(parse_range(option, part), std::back_inserter(axis.values));
    } else {
      axis.values.push_back(parse_value(option, part));
    }
    begin = comma + 1;
  }
  Draft scratch;
  for (const Value& value : axis.values) { option.set(scratch, value); }
  return axis;
}

}  // namespace

std::vector<SweepAxis> parse_sweeps(std::span<const std::string> texts) {
  std::vector<SweepAxis> axes;
  std::size_t rows = 1;
  for (const std::string& text : texts) {
    try {
      axes.push_back(parse_sweep(text));
      const Option* option = axes.back().option;
      ANNULUS_EXPECTS(std::count_if(axes.begin(), axes.end(), [&](const SweepAxis& axis) { return axis.option == option; }) == 1,
                      "{} is swept twice", option->name);
      rows *= axes.back().values.size();
      ANNULUS_EXPECTS(rows <= kMostRows, "the table has {} rows or more, at most {} are allowed", rows, kMostRows);
    } catch (const InvalidArgument& error) { throw InvalidArgument(fmt::format("--sweep '{}': {}", text, error.what())); }
  }
  return axes;
}

std::string describe_swept(const BenchRow& row) {
  std::string text;
  for (const auto& [name, value] : row.swept) { text += fmt::format("{}{} {}", text.empty() ? "" : ", ", name, text_of(value)); }
  return text;
}

std::vector<BenchRow> bench_rows(const Draft& draft) {
  const std::vector<SweepAxis> axes = parse_sweeps(draft.config.sweep);
  std::size_t count = 1;
  for (const SweepAxis& axis : axes) { count *= axis.values.size(); }
  std::vector<BenchRow> rows(count);
  for (std::size_t index = 0; index < count; ++index) {
    BenchRow& row = rows[index];
    Draft own = draft;
    own.config.sweep.clear();
    std::size_t block = count;
    for (const SweepAxis& axis : axes) {
      block /= axis.values.size();
      const Value& value = axis.values[index / block % axis.values.size()];
      apply(own, *axis.option, value);
      row.swept.emplace_back(axis.option->name, value);
    }
    try {
      row.config = complete(std::move(own));
    } catch (const InvalidArgument& error) {
      if (axes.empty()) { throw; }
      throw InvalidArgument(fmt::format("row {} of {} ({}): {}", index + 1, count, describe_swept(row), error.what()));
    }
  }
  return rows;
}

}  // namespace annulus::app
