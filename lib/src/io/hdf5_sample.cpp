// SPDX-License-Identifier: Apache-2.0
#include "hdf5_sample.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <set>
#include <span>
#include <sys/stat.h>
#include <system_error>
#include <utility>
#include <vector>

namespace annulus {

namespace {

/// A tensor of no more values is compared whole, by one caller: reading it costs less than finding places in it.
constexpr std::int64_t kWholeValues = std::int64_t{1} << 20;
/// Places of a larger one, besides its first and its last row.
constexpr std::int64_t kSampledValues = 4096;

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014, figure 18): every bit of the result depends on every bit of `bits`.
std::uint64_t mixed(std::uint64_t bits) {
  bits = (bits ^ (bits >> 30U)) * 0xbf58476d1ce4e5b9U;
  bits = (bits ^ (bits >> 27U)) * 0x94d049bb133111ebU;
  return bits ^ (bits >> 31U);
}

/// Consecutive values of the tensor, in memory order.
struct Run {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// Ascending and disjoint, so that a chunk of the file is met once.
std::vector<Run> sampled_runs(std::int64_t total, std::int64_t row) {
  if (total <= std::max(kWholeValues, 2 * row)) { return {{0, total}}; }
  std::set<std::int64_t> places;
  for (std::uint64_t state = 1; static_cast<std::int64_t>(places.size()) < kSampledValues; ++state) {
    places.insert(row + static_cast<std::int64_t>(mixed(state) % static_cast<std::uint64_t>(total - 2 * row)));
  }
  std::vector<Run> runs{{0, row}};
  for (const std::int64_t place : places) { runs.push_back({place, 1}); }
  runs.push_back({total - row, row});
  return runs;
}

/// Where the values of `runs` lie: all, whole rows of heads, or one each; in memory they come one after another.
std::vector<SlabCopy> slabs_of(const std::vector<hsize_t>& extents, std::span<const Run> runs) {
  std::vector<SlabCopy> slabs;
  hsize_t offset = 0;
  for (const Run& run : runs) {
    std::vector<hsize_t> start(extents.size());
    std::vector<hsize_t> extent(extents.size(), 1);
    auto rest = static_cast<hsize_t>(run.first);
    auto left = static_cast<hsize_t>(run.count);
    for (std::size_t axis = extents.size(); axis-- > 0;) {
      start[axis] = rest % extents[axis];
      rest /= extents[axis];
      extent[axis] = std::min(left, extents[axis]);
      left /= extent[axis];
    }
    slabs.push_back(box_in_order(std::move(start), std::move(extent), offset));
    offset += static_cast<hsize_t>(run.count);
  }
  return slabs;
}

}  // namespace

std::uint64_t sample_fingerprint(BoxReader& reader, const FileDType& dtype, const std::vector<hsize_t>& extents, std::int64_t row,
                                 std::int64_t part, std::int64_t parts) {
  std::int64_t total = 1;
  for (const hsize_t extent : extents) { total *= static_cast<std::int64_t>(extent); }
  const std::vector<Run> all = sampled_runs(total, row);
  const auto count = static_cast<std::int64_t>(all.size());
  const auto bound = [&](std::int64_t index) { return count / parts * index + std::min(index, count % parts); };
  const std::span<const Run> own(all.data() + bound(part), static_cast<std::size_t>(bound(part + 1) - bound(part)));
  if (own.empty()) { return 0; }

  std::size_t values = 0;
  for (const Run& run : own) { values += static_cast<std::size_t>(run.count); }
  const auto size = static_cast<std::size_t>(size_of(dtype.dtype));
  std::vector<std::byte> stored(values * size);
  {
    const Hdf5Lock lock;
    reader.read(slabs_of(extents, own), stored.data());
  }
  if (dtype.byte_swapped) { swap_bytes(dtype.dtype, stored.data(), static_cast<std::int64_t>(values)); }

  std::uint64_t sum = 0;
  const std::byte* value = stored.data();
  for (const Run& run : own) {
    for (std::int64_t index = run.first; index < run.first + run.count; ++index, value += size) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, value, size);
      sum += mixed(mixed(static_cast<std::uint64_t>(index) + 1) ^ bits);
    }
  }
  return sum;
}

std::string file_instance(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    throw RuntimeFailure(fmt::format("input file '{}': {}", path, std::generic_category().message(errno)));
  }
  // Containers of one host may have other names but run one kernel; hosts of one name run two.
  std::string boot;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot);
  return fmt::format("{} {} {}", boot, status.st_dev, status.st_ino);
}

std::string file_instances(const std::vector<std::string>& paths) {
  std::string all;
  for (const std::string& path : paths) { all += file_instance(path) + '\n'; }
  return all;
}

}  // namespace annulus
