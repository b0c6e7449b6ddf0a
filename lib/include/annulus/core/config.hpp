// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/core/enums.hpp>
#include <annulus/core/grid.hpp>
#include <annulus/core/layer.hpp>
#include <annulus/core/problem.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace annulus {

/// Everything one invocation was told, after preset, config file and flags. Field names are the option names.
struct Config {
  Problem problem;
  std::optional<double> scale;  ///< as given; otherwise the input file's attribute or 1/sqrt(head_dim)
  std::optional<DType> dtype;   ///< as given; otherwise the input file's
  std::uint64_t seed = 1;

  Pattern pattern;  ///< no branches: dense

  bool gradients = false;  ///< of a loss, from dO

  std::optional<Layer> layer;  ///< around the attention; extents that are 0 are filled in

  Grid grid;  ///< as asked for
  PartitionKind partition = PartitionKind::automatic;
  Schedule schedule = Schedule::automatic;
  KeyOrder key_order = KeyOrder::automatic;
  TileOrder tile_order = TileOrder::linear;
  TransportKind transport = TransportKind::automatic;
  BackendKind backend = BackendKind::cpu;
  KernelKind kernel = KernelKind::automatic;
  std::int64_t tile_rows = 0;      ///< 0: chosen by the kernel
  std::int64_t threads = 0;        ///< 0: allowed CPUs / ranks on this host
  std::int64_t virtual_ranks = 1;  ///< ranks run inside one process by transport loopback
  bool share_gpu = false;
  MemoryPooling memory_pool = MemoryPooling::on;
  std::int64_t plan_cache = 64;  ///< bench: plans kept from row to row
  double timeout_s = 300.0;      ///< 0: never
  double max_time_s = 0.0;       ///< after which nothing more is begun; 0: no limit

  std::int64_t part_batch = 0;  ///< run: batch entries that are computed at a time; 0: all, or as many as fit

  std::string input;   ///< HDF5 file; empty: generated
  std::string output;  ///< HDF5 file; empty: none
  bool force = false;

  std::int64_t rows = 0;   ///< check: sampled rows; 0: all when small, else 256
  std::int64_t cases = 0;  ///< check: random problems; 0: the configured problem alone
  std::int64_t warmup = 3;
  std::int64_t repetitions = 20;
  std::vector<std::string> sweep;         ///< bench: KEY=VALUES, outermost first; the rows are their product
  std::string csv;                        ///< bench: CSV file; empty: none
  bool resume = false;                    ///< goes on with the output of a job that was stopped
  std::int64_t ranks = 0;                 ///< plan: ranks planned for; 0: virtual_ranks
  std::vector<std::int64_t> rank_counts;  ///< plan: as given, one job each; `ranks` is the first
  std::string machine;                    ///< plan, bench: TOML file of a machine's constants; empty: no times are predicted
  std::string calibrate;                  ///< bench: TOML file for the constants of this machine; empty: rows are timed instead
  bool check = false;                     ///< info: looks whether the machine is fit for the job
  std::string result;                     ///< info: result file to describe instead of the machine; empty: none

  std::string preset_file;  ///< where the preset was read; empty: none
  std::string config_file;  ///< as named; empty: none

  // Of a resolved configuration:
  Grid places;              ///< the grid with as many places as there are ranks
  std::string grid_reason;  ///< why it is what it is; empty if asked for
  std::string ways_reason;  ///< the same of partition and schedule

  std::set<std::string, std::less<>> given;  ///< options that preset, file or flags set, by name
};

}  // namespace annulus
