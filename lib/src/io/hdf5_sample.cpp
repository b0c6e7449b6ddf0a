// SPDX-License-Identifier: Apache-2.0
#include "hdf5_sample.hpp"

#include <annulus/core/error.hpp>

#include "hdf5_open.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <set>
#include <sys/stat.h>
#include <system_error>
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

/// The places of the values of `runs`, [values, axes].
std::vector<hsize_t> coordinates_of(std::span<const hsize_t> extents, std::span<const Run> runs, std::size_t values) {
  std::vector<hsize_t> coordinates;
  coordinates.reserve(values * extents.size());
  std::vector<hsize_t> place(extents.size());
  for (const Run& run : runs) {
    for (std::int64_t index = run.first; index < run.first + run.count; ++index) {
      auto rest = static_cast<hsize_t>(index);
      for (std::size_t axis = extents.size(); axis-- > 0;) {
        place[axis] = rest % extents[axis];
        rest /= extents[axis];
      }
      coordinates.insert(coordinates.end(), place.begin(), place.end());
    }
  }
  return coordinates;
}

/// Reads the values of `runs` into `out`, as stored; `whole`: they are all.
void read_runs(const SampledDataset& sampled, std::span<const Run> runs, std::size_t values, bool whole, void* out) {
  const Hdf5Lock lock;
  const std::vector<hsize_t> coordinates = whole ? std::vector<hsize_t>() : coordinates_of(sampled.extents, runs, values);
  if (sampled.filtered != nullptr) {
    if (whole) {
      const std::vector<hsize_t> extents(sampled.extents.begin(), sampled.extents.end());
      sampled.filtered->read(std::vector<hsize_t>(extents.size(), 0), extents, out);
    } else {
      sampled.filtered->read_elements(coordinates, out);
    }
    return;
  }
  const Hdf5Handle space(check_h5(H5Dget_space(sampled.dataset), "H5Dget_space"));
  if (whole) {
    check_h5(H5Sselect_all(space.get()), "H5Sselect_all");
  } else {
    check_h5(H5Sselect_elements(space.get(), H5S_SELECT_SET, values, coordinates.data()), "H5Sselect_elements");
  }
  const hsize_t length = values;
  const Hdf5Handle memory(check_h5(H5Screate_simple(1, &length, nullptr), "H5Screate_simple"));
  if (H5Dread(sampled.dataset, sampled.type, memory.get(), space.get(), H5P_DEFAULT, out) < 0) { refuse_unreadable(sampled.what); }
}

}  // namespace

std::uint64_t sample_fingerprint(const SampledDataset& sampled, std::int64_t part, std::int64_t parts) {
  std::int64_t total = 1;
  for (const hsize_t extent : sampled.extents) { total *= static_cast<std::int64_t>(extent); }
  const std::int64_t row =
      static_cast<std::int64_t>(sampled.extents[sampled.extents.size() - 1] * sampled.extents[sampled.extents.size() - 2]);
  const std::vector<Run> all = sampled_runs(total, row);
  const auto count = static_cast<std::int64_t>(all.size());
  const auto bound = [&](std::int64_t index) { return count / parts * index + std::min(index, count % parts); };
  const std::span<const Run> own(all.data() + bound(part), static_cast<std::size_t>(bound(part + 1) - bound(part)));
  if (own.empty()) { return 0; }

  std::size_t values = 0;
  for (const Run& run : own) { values += static_cast<std::size_t>(run.count); }
  const auto size = static_cast<std::size_t>(size_of(sampled.dtype.dtype));
  std::vector<std::byte> stored(values * size);
  read_runs(sampled, own, values, static_cast<std::int64_t>(values) == total, stored.data());
  if (sampled.dtype.byte_swapped) { swap_bytes(sampled.dtype.dtype, stored.data(), static_cast<std::int64_t>(values)); }

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

}  // namespace annulus
