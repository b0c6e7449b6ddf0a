// SPDX-License-Identifier: Apache-2.0
// The constants of a machine from which the simulator predicts times. They are measured or published; nothing here is fitted to a ring.
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/kernels/tasks.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace annulus {

/// When messages move.
enum class Transfers {
  beside_work,  ///< by themselves, while the ranks compute: copy engines, network cards
  in_wait,      ///< while their receiver waits for them, as most MPI libraries do on processors
};

template <>
struct EnumNames<Transfers> {
  static constexpr std::array<std::pair<Transfers, std::string_view>, 2> values{
      {{Transfers::beside_work, "beside-work"}, {Transfers::in_wait, "in-wait"}}};
};

/// What a copy or a message of so many bytes takes.
struct TransferTime {
  std::int64_t bytes = 0;
  double us = 0;
  bool operator==(const TransferTime&) const = default;
};

/// Times by size, ascending in bytes. Between two sizes time is linear; above the last it goes on at the rate of the last two, below the
/// first it is the first's.
class TransferTable {
 public:
  TransferTable() = default;
  /// @throws InvalidArgument unless sizes ascend and times are positive and finite
  explicit TransferTable(std::vector<TransferTime> times);

  /// 0 for no bytes. The table must not be empty.
  double us(double bytes) const;
  const std::vector<TransferTime>& times() const { return times_; }
  bool operator==(const TransferTable&) const = default;

 private:
  std::vector<TransferTime> times_;
};

/// Rates of attention of so many query rows to as many key rows of one head, with many of them at work together.
struct BlockRates {
  struct Rate {
    std::int64_t rows = 0;
    double gflops = 0;  ///< 4 * head_dim * visible pairs, a second, of a rank
    bool operator==(const Rate&) const = default;
  };
  DType dtype = DType::fp32;
  std::int64_t head_dim = 0;
  kernels::Mask mask = kernels::Mask::none;
  std::int64_t dilation_rate = 1;  ///< rows of a block lie so far apart in memory
  std::vector<Rate> rates;         ///< by rows, ascending
  bool operator==(const BlockRates&) const = default;
};

struct Machine {
  std::string name;    ///< one line for reports
  std::string source;  ///< where its numbers come from
  std::int64_t ranks_per_host = 1;
  std::int64_t memory_bytes = 0;  ///< of a rank; 0: unknown
  Transfers transfers = Transfers::beside_work;
  double launch_gap_us = 0;    ///< what a wave of work costs besides its arithmetic
  std::int64_t lanes = 1;      ///< tiles that a rank works on at once: threads, or multiprocessors of a GPU
  std::int64_t tile_rows = 1;  ///< query rows of a tile
  TransferTable copy;          ///< inside a rank's memory
  TransferTable partials;      ///< making partials of so many bytes empty, and O and LSE of them; empty: half of copies of them
  TransferTable link_inside;   ///< from rank to rank of one host
  TransferTable link_between;  ///< from host to host; empty: there is one host
  std::vector<BlockRates> block_rates;
  bool operator==(const Machine&) const = default;

  std::int64_t host_of(std::int64_t rank) const { return rank / ranks_per_host; }
  /// @throws InvalidArgument if they are on two hosts and the machine has one
  const TransferTable& link(std::int64_t rank, std::int64_t peer) const;
  /// Floating point operations a second of work with rows of `head_dim` elements, `rows` of them: of a table of the dtype, the one whose
  /// head_dim is nearest, then whose dilation rate is. Between two numbers of rows it is linear in their logarithms, below the least in
  /// proportion, above the largest the largest's. Work under a causal mask takes the rates without one where the machine has no others.
  /// @throws InvalidArgument if the machine has no rates of the dtype
  double flops_per_s(DType dtype, std::int64_t head_dim, kernels::Mask mask, std::int64_t dilation_rate, double rows) const;
};

/// @throws InvalidArgument that says what is missing, not positive or out of order
void validate(const Machine& machine);

}  // namespace annulus
