// SPDX-License-Identifier: Apache-2.0
#include "machine_file.hpp"

#include <annulus/core/error.hpp>
#include <annulus/core/text.hpp>

#include "config_file.hpp"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <array>
#include <cmath>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus::app {

namespace {

constexpr double kBytesPerGib = 1024.0 * 1024.0 * 1024.0;
constexpr std::array<std::pair<kernels::Mask, std::string_view>, 2> kMaskNames{
    {{kernels::Mask::none, "none"}, {kernels::Mask::causal, "causal"}}};

/// A table of which every key is taken, or refused.
class Keys {
 public:
  Keys(const toml::table& table, std::string path) : table_(table), path_(std::move(path)) {}

  /// Calls take(node) for the key if it is there. Taken keys are no unknown ones.
  template <class Take>
  void with(std::string_view key, Take&& take) {
    taken_.emplace_back(key);
    if (const toml::node* const node = table_.get(key)) { take(*node); }
  }
  template <class Take>
  void with_needed(std::string_view key, Take&& take) {
    ANNULUS_EXPECTS(table_.contains(key), "{}: {} is missing", where(table_), key);
    with(key, std::forward<Take>(take));
  }

  void text(std::string_view key, std::string& value) {
    with(key, [&](const toml::node& node) {
      const auto found = node.value_exact<std::string>();
      ANNULUS_EXPECTS(found.has_value(), "{}: {} is not a string", where(node), key);
      value = *found;
    });
  }
  void integer(std::string_view key, std::int64_t& value) {
    with(key, [&](const toml::node& node) {
      const auto found = node.value_exact<std::int64_t>();
      ANNULUS_EXPECTS(found.has_value(), "{}: {} is not an integer", where(node), key);
      value = *found;
    });
  }
  void real(std::string_view key, double& value) {
    with(key, [&](const toml::node& node) { value = number_of(node, key); });
  }
  std::vector<std::int64_t> integers(std::string_view key) {
    std::vector<std::int64_t> numbers;
    with_needed(key, [&](const toml::node& node) {
      for (const toml::node& element : list_of(node, key)) {
        const auto number = element.value_exact<std::int64_t>();
        ANNULUS_EXPECTS(number.has_value(), "{}: {} holds what is not an integer", where(element), key);
        numbers.push_back(*number);
      }
    });
    return numbers;
  }
  std::vector<double> reals(std::string_view key) {
    std::vector<double> numbers;
    with_needed(key, [&](const toml::node& node) {
      for (const toml::node& element : list_of(node, key)) { numbers.push_back(number_of(element, key)); }
    });
    return numbers;
  }

  void refuse_others() const {
    for (const auto& [key, node] : table_) {
      const bool known = std::find(taken_.begin(), taken_.end(), key.str()) != taken_.end();
      ANNULUS_EXPECTS(known, "{}: unknown key {}", where(node), printable(key.str()));
    }
  }

  std::string where(const toml::node& node) const { return fmt::format("{}:{}", path_, node.source().begin.line); }

 private:
  double number_of(const toml::node& node, std::string_view key) const {
    const auto number = node.is_number() ? node.value<double>() : std::nullopt;
    ANNULUS_EXPECTS(number.has_value() && std::isfinite(*number), "{}: {} is not a finite number", where(node), key);
    return *number;
  }
  const toml::array& list_of(const toml::node& node, std::string_view key) const {
    const toml::array* const list = node.as_array();
    ANNULUS_EXPECTS(list != nullptr, "{}: {} is not a list", where(node), key);
    return *list;
  }

  const toml::table& table_;
  std::string path_;
  std::vector<std::string> taken_;
};

/// A table of a node. @throws InvalidArgument if it is none
const toml::table& table_of(const toml::node& node, const Keys& keys, std::string_view name) {
  const toml::table* const table = node.as_table();
  ANNULUS_EXPECTS(table != nullptr, "{}: {} is not a table", keys.where(node), name);
  return *table;
}

void require_alike(std::size_t first, std::size_t second, const std::string& where, const char* of_first, const char* of_second) {
  ANNULUS_EXPECTS(first == second && first > 0, "{}: {} numbers of {} and {} of {}", where, first, of_first, second, of_second);
}

TransferTable transfers_of(const toml::table& table, const std::string& path) {
  Keys keys(table, path);
  const std::vector<std::int64_t> bytes = keys.integers("bytes");
  const std::vector<double> us = keys.reals("us");
  keys.refuse_others();
  require_alike(bytes.size(), us.size(), keys.where(table), "bytes", "us");
  std::vector<TransferTime> times;
  for (std::size_t i = 0; i < bytes.size(); ++i) { times.push_back({bytes[i], us[i]}); }
  return TransferTable(std::move(times));
}

BlockRates rates_of(const toml::table& table, const std::string& path) {
  Keys keys(table, path);
  BlockRates rates;
  std::string dtype;
  std::string mask = "none";
  keys.text("dtype", dtype);
  keys.integer("head-dim", rates.head_dim);
  keys.text("mask", mask);
  keys.integer("dilation-rate", rates.dilation_rate);
  const std::vector<std::int64_t> rows = keys.integers("rows");
  const std::vector<double> gflops = keys.reals("gflops");
  keys.refuse_others();
  const std::optional<DType> known = from_string<DType>(dtype);
  ANNULUS_EXPECTS(known.has_value(), "{}: dtype '{}' is not one of {}", keys.where(table), printable(dtype), names_of<DType>());
  rates.dtype = *known;
  const auto named = std::find_if(kMaskNames.begin(), kMaskNames.end(), [&](const auto& each) { return each.second == mask; });
  ANNULUS_EXPECTS(named != kMaskNames.end(), "{}: mask '{}' is not none or causal", keys.where(table), printable(mask));
  rates.mask = named->first;
  require_alike(rows.size(), gflops.size(), keys.where(table), "rows", "gflops");
  for (std::size_t i = 0; i < rows.size(); ++i) { rates.rates.push_back({rows[i], gflops[i]}); }
  return rates;
}

/// A list of a table's numbers, several on a line.
template <class List, class Get>
std::string list_in_toml(const List& list, Get get) {
  std::vector<std::string> numbers;
  for (const auto& each : list) { numbers.push_back(fmt::format("{}", get(each))); }
  return fmt::format("[{}]", fmt::join(numbers, ", "));
}

/// A float that TOML does not take for an integer.
std::string real_in_toml(double number) {
  const std::string text = fmt::format("{:.6g}", number);
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

}  // namespace

Machine read_machine(const std::string& path) {
  toml::table table;
  try {
    table = toml::parse(read_config(path), path);
  } catch (const toml::parse_error& error) {
    throw InvalidArgument(fmt::format("{}:{}: {}", path, error.source().begin.line, printable(error.description())));
  }
  Machine machine;
  Keys keys(table, path);
  keys.text("name", machine.name);
  keys.text("source", machine.source);
  keys.integer("ranks-per-host", machine.ranks_per_host);
  double memory_gib = 0;
  keys.real("memory-gib", memory_gib);
  ANNULUS_EXPECTS(memory_gib >= 0 && memory_gib < 1e9, "{}: memory-gib {} is not a size of memory", path, memory_gib);
  machine.memory_bytes = static_cast<std::int64_t>(memory_gib * kBytesPerGib);
  std::string transfers(to_string(machine.transfers));
  keys.text("transfers", transfers);
  const std::optional<Transfers> known = from_string<Transfers>(transfers);
  ANNULUS_EXPECTS(known.has_value(), "{}: transfers '{}' is not one of {}", path, printable(transfers), names_of<Transfers>());
  machine.transfers = *known;
  keys.real("launch-gap-us", machine.launch_gap_us);
  keys.integer("lanes", machine.lanes);
  keys.integer("tile-rows", machine.tile_rows);
  for (const auto& [name, place] : {std::pair{"copy", &machine.copy}, std::pair{"partials", &machine.partials},
                                    std::pair{"link-inside", &machine.link_inside}, std::pair{"link-between", &machine.link_between}}) {
    keys.with(name, [&, name = name, place = place](const toml::node& node) { *place = transfers_of(table_of(node, keys, name), path); });
  }
  keys.with("block-rates", [&](const toml::node& node) {
    const toml::array* const list = node.as_array();
    ANNULUS_EXPECTS(list != nullptr, "{}: block-rates is not a list of tables", keys.where(node));
    for (const toml::node& each : *list) { machine.block_rates.push_back(rates_of(table_of(each, keys, "block-rates"), path)); }
  });
  keys.refuse_others();
  try {
    validate(machine);
  } catch (const InvalidArgument& error) { throw InvalidArgument(fmt::format("machine file '{}': {}", path, error.what())); }
  return machine;
}

std::string to_toml(const Machine& machine) {
  std::string text;
  const auto add = [&](std::string_view key, const std::string& value) { text += fmt::format("{} = {}\n", key, value); };
  add("name", toml_string(machine.name));
  add("source", toml_string(machine.source));
  add("ranks-per-host", fmt::format("{}", machine.ranks_per_host));
  add("memory-gib", real_in_toml(static_cast<double>(machine.memory_bytes) / kBytesPerGib));
  add("transfers", toml_string(std::string(to_string(machine.transfers))));
  add("launch-gap-us", real_in_toml(machine.launch_gap_us));
  add("lanes", fmt::format("{}", machine.lanes));
  add("tile-rows", fmt::format("{}", machine.tile_rows));
  for (const auto& [name, table] : {std::pair{"copy", &machine.copy}, std::pair{"partials", &machine.partials},
                                    std::pair{"link-inside", &machine.link_inside}, std::pair{"link-between", &machine.link_between}}) {
    if (table->times().empty()) { continue; }
    text += fmt::format("\n[{}]\n", name);
    add("bytes", list_in_toml(table->times(), [](const TransferTime& time) { return time.bytes; }));
    add("us", list_in_toml(table->times(), [](const TransferTime& time) { return real_in_toml(time.us); }));
  }
  for (const BlockRates& rates : machine.block_rates) {
    text += "\n[[block-rates]]\n";
    add("dtype", toml_string(std::string(to_string(rates.dtype))));
    add("head-dim", fmt::format("{}", rates.head_dim));
    const auto named = std::find_if(kMaskNames.begin(), kMaskNames.end(), [&](const auto& each) { return each.first == rates.mask; });
    add("mask", toml_string(std::string(named->second)));
    if (rates.dilation_rate != 1) { add("dilation-rate", fmt::format("{}", rates.dilation_rate)); }
    add("rows", list_in_toml(rates.rates, [](const BlockRates::Rate& rate) { return rate.rows; }));
    add("gflops", list_in_toml(rates.rates, [](const BlockRates::Rate& rate) { return real_in_toml(rate.gflops); }));
  }
  return text;
}

}  // namespace annulus::app
