// SPDX-License-Identifier: Apache-2.0
#include <annulus/gpu/gpu_assignment.hpp>

#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/gpu/cuda_devices.hpp>

#include <algorithm>
#include <map>
#include <string_view>
#include <utility>

namespace annulus {

namespace {

constexpr std::string_view kShareHint = "--share-gpu lets ranks share one, for tests: timings then mean nothing";

/// host, host rank, ranks on the host and UUIDs, one a line.
std::string encode(const GpuClaim& claim) {
  std::string text = fmt::format("{}\n{}\n{}\n", claim.host, claim.host_rank, claim.host_size);
  for (const std::string& uuid : claim.uuids) { text += uuid + '\n'; }
  return text;
}

GpuClaim decode(std::string_view text) {
  const auto line = [&text] {
    const std::size_t end = text.find('\n');
    std::string taken(text.substr(0, end));
    text.remove_prefix(end + 1);
    return taken;
  };
  GpuClaim claim;
  claim.host = line();
  claim.host_rank = std::stoll(line());
  claim.host_size = std::stoll(line());
  while (!text.empty()) { claim.uuids.push_back(line()); }
  return claim;
}

}  // namespace

std::vector<int> choose_devices(std::span<const GpuClaim> claims, bool share_gpu) {
  std::vector<int> devices;
  std::map<std::string, std::size_t> owners;
  for (std::size_t rank = 0; rank < claims.size(); ++rank) {
    const GpuClaim& claim = claims[rank];
    const auto gpus = std::ssize(claim.uuids);
    ANNULUS_EXPECTS(gpus > 0, "rank {} ({}) sees no GPU: there is none, its driver is missing or too old, or CUDA_VISIBLE_DEVICES hides it",
                    rank, claim.host);
    ANNULUS_EXPECTS(share_gpu || gpus == 1 || gpus >= claim.host_size, "{} has {} GPUs for {} ranks; {}", claim.host, gpus, claim.host_size,
                    kShareHint);
    const std::int64_t device = gpus == 1 ? 0 : claim.host_rank % gpus;
    const auto [owner, is_new] = owners.try_emplace(claim.uuids[static_cast<std::size_t>(device)], rank);
    ANNULUS_EXPECTS(share_gpu || is_new, "rank {} ({}) and rank {} ({}) have the same GPU, {}; {}", owner->second,
                    claims[owner->second].host, rank, claim.host, owner->first, kShareHint);
    devices.push_back(static_cast<int>(device));
  }
  return devices;
}

int assign_gpu(const Communicator& comm, bool share_gpu) {
  GpuClaim own{comm.host(), comm.host_rank(), comm.host_size(), {}};
  together(comm, [&] {
    if (build_info().cuda.empty()) { throw NotCompiled("backend cuda is not compiled into this binary; it has: reference, cpu"); }
    for (const GpuInfo& gpu : visible_gpus()) { own.uuids.push_back(gpu.uuid); }
  });
  std::vector<GpuClaim> claims;
  for (const std::string& text : comm.all_gather(encode(own))) { claims.push_back(decode(text)); }
  int device = 0;
  together(comm, [&] { device = choose_devices(claims, share_gpu)[static_cast<std::size_t>(comm.rank())]; });
  return device;
}

std::int64_t ranks_on_gpu(const Communicator& comm, int device) {
  std::string uuid;
  together(comm, [&] { uuid = visible_gpus().at(static_cast<std::size_t>(device)).uuid; });
  const std::vector<std::string> uuids = comm.all_gather(uuid);
  return std::count(uuids.begin(), uuids.end(), uuid);
}

}  // namespace annulus
