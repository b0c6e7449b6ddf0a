// SPDX-License-Identifier: Apache-2.0
#include <annulus/plan/machine.hpp>

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>

namespace annulus {

namespace {

std::string_view name_of(kernels::Mask mask) {
  switch (mask) {
    case kernels::Mask::causal:
      return "causal";
    case kernels::Mask::none:
      break;
  }
  return "none";
}

/// The rate at `rows` of a table.
double rate_at(const std::vector<BlockRates::Rate>& rates, double rows) {
  const auto above =
      std::find_if(rates.begin(), rates.end(), [&](const BlockRates::Rate& rate) { return static_cast<double>(rate.rows) >= rows; });
  if (above == rates.end()) { return rates.back().gflops; }
  const auto rows_above = static_cast<double>(above->rows);
  // What few rows cost besides arithmetic does not shrink with them.
  if (above == rates.begin()) { return above->gflops * rows / rows_above; }
  const BlockRates::Rate& below = *std::prev(above);
  const auto rows_below = static_cast<double>(below.rows);
  return std::lerp(below.gflops, above->gflops, std::log(rows / rows_below) / std::log(rows_above / rows_below));
}

}  // namespace

TransferTable::TransferTable(std::vector<TransferTime> times) : times_(std::move(times)) {
  for (std::size_t i = 0; i < times_.size(); ++i) {
    ANNULUS_EXPECTS(times_[i].bytes > 0 && std::isfinite(times_[i].us) && times_[i].us > 0, "{} bytes in {} us: neither may be 0 or less",
                    times_[i].bytes, times_[i].us);
    ANNULUS_EXPECTS(i == 0 || times_[i - 1].bytes < times_[i].bytes, "{} bytes come after {}; sizes ascend", times_[i].bytes,
                    i == 0 ? 0 : times_[i - 1].bytes);
  }
}

double TransferTable::us(double bytes) const {
  ANNULUS_ASSERT(!times_.empty(), "a transfer of {} bytes without a table of times", bytes);
  if (bytes <= 0) { return 0; }
  const auto size = [](const TransferTime& time) { return static_cast<double>(time.bytes); };
  if (bytes <= size(times_.front())) { return times_.front().us; }
  auto above = std::find_if(times_.begin(), times_.end(), [&](const TransferTime& time) { return size(time) >= bytes; });
  if (times_.size() == 1) { return times_.front().us * bytes / size(times_.front()); }
  if (above == times_.end()) { --above; }
  const TransferTime& low = *std::prev(above);
  // A table whose last time is no longer than the one before it is noise, and time goes on with size all the same.
  if (bytes > size(*above) && above->us <= low.us) { return above->us * bytes / size(*above); }
  return low.us + (above->us - low.us) * (bytes - size(low)) / (size(*above) - size(low));
}

const TransferTable& Machine::link(std::int64_t rank, std::int64_t peer) const {
  const bool inside = host_of(rank) == host_of(peer);
  const TransferTable& table = inside ? link_inside : link_between;
  ANNULUS_EXPECTS(!table.times().empty(), "ranks {} and {} are on {}, and the machine has no times of a link there", rank, peer,
                  inside ? "one host" : "two hosts");
  return table;
}

double Machine::flops_per_s(DType dtype, std::int64_t head_dim, kernels::Mask mask, std::int64_t dilation_rate, double rows) const {
  const BlockRates* best = nullptr;
  std::tuple<bool, double, double> best_distance;
  const auto between = [](std::int64_t a, std::int64_t b) { return std::abs(std::log(static_cast<double>(a) / static_cast<double>(b))); };
  for (const BlockRates& table : block_rates) {
    if (table.dtype != dtype) { continue; }
    const std::tuple<bool, double, double> found{table.mask != mask, between(table.head_dim, head_dim),
                                                 between(table.dilation_rate, dilation_rate)};
    if (best == nullptr || found < best_distance) {
      best = &table;
      best_distance = found;
    }
  }
  ANNULUS_EXPECTS(best != nullptr, "machine '{}' has no block rates of {}", name, to_string(dtype));
  return 1e9 * rate_at(best->rates, rows);
}

void validate(const Machine& machine) {
  ANNULUS_EXPECTS(machine.ranks_per_host >= 1, "ranks-per-host {} is below 1", machine.ranks_per_host);
  ANNULUS_EXPECTS(machine.memory_bytes >= 0, "memory of {} bytes", machine.memory_bytes);
  ANNULUS_EXPECTS(std::isfinite(machine.launch_gap_us) && machine.launch_gap_us >= 0, "launch-gap-us {} is negative",
                  machine.launch_gap_us);
  ANNULUS_EXPECTS(machine.lanes >= 1 && machine.tile_rows >= 1, "lanes {} and tile-rows {} are at least 1", machine.lanes,
                  machine.tile_rows);
  ANNULUS_EXPECTS(!machine.copy.times().empty(), "times of copies are missing");
  ANNULUS_EXPECTS(machine.ranks_per_host == 1 || !machine.link_inside.times().empty(), "times of the link inside a host are missing");
  ANNULUS_EXPECTS(!machine.block_rates.empty(), "block rates are missing");
  std::set<std::tuple<DType, std::int64_t, kernels::Mask, std::int64_t>> known;
  for (const BlockRates& table : machine.block_rates) {
    ANNULUS_EXPECTS(table.dilation_rate >= 1, "dilation-rate {} of block rates is below 1", table.dilation_rate);
    ANNULUS_EXPECTS(table.head_dim >= 1 && !table.rates.empty(), "block rates of head-dim {} with {} numbers of rows", table.head_dim,
                    table.rates.size());
    ANNULUS_EXPECTS(known.insert({table.dtype, table.head_dim, table.mask, table.dilation_rate}).second,
                    "block rates of {}, head-dim {}, mask {} and dilation-rate {} stand twice", to_string(table.dtype), table.head_dim,
                    name_of(table.mask), table.dilation_rate);
    for (std::size_t i = 0; i < table.rates.size(); ++i) {
      const BlockRates::Rate& rate = table.rates[i];
      ANNULUS_EXPECTS(rate.rows >= 1 && std::isfinite(rate.gflops) && rate.gflops > 0, "{} rows at {} GFLOP/s: neither may be 0 or less",
                      rate.rows, rate.gflops);
      ANNULUS_EXPECTS(i == 0 || table.rates[i - 1].rows < rate.rows, "block rates of {} rows come after {}; rows ascend", rate.rows,
                      i == 0 ? 0 : table.rates[i - 1].rows);
    }
  }
}

}  // namespace annulus
