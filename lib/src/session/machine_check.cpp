// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/machine_check.hpp>

#include <annulus/core/build_info.hpp>
#include <annulus/core/error.hpp>
#include <annulus/device/device.hpp>
#include <annulus/gpu/gpu_assignment.hpp>
#include <annulus/transport/make_transport.hpp>

#include <mpi.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <utility>

namespace annulus {

namespace {

/// Large enough that a message's latency does not count, small enough for any device.
constexpr std::int64_t kMessageBytes = std::int64_t{32} << 20;

using Json = nlohmann::json;

/// Whether somebody asked for no GPU: an empty list, or what launchers put there for a job that has none.
bool asks_for_no_gpu() {
  const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
  if (visible == nullptr) { return false; }
  const std::string_view devices = visible;
  return devices.empty() || devices == "NoDevFiles" || devices == "-1";
}

RankView own_view(const Communicator& comm) {
  RankView view;
  view.host = comm.host();
  view.cpus = allowed_cpus();
  view.gpus = visible_gpus();
  view.obstacle = gpu_obstacle();
  std::error_code ignored;
  view.has_hidden_gpu = view.gpus.empty() && !asks_for_no_gpu() && std::filesystem::exists("/dev/nvidia0", ignored);
  return view;
}

std::string packed(const RankView& view) {
  Json gpus = Json::array();
  for (const GpuInfo& gpu : view.gpus) {
    gpus.push_back({gpu.name, gpu.uuid, gpu.total_bytes, gpu.clock_mhz, gpu.memory_clock_mhz, gpu.ecc});
  }
  return Json{view.host, view.cpus, std::move(gpus), view.obstacle, view.has_hidden_gpu}.dump();
}

RankView unpacked(const std::string& text) {
  const Json json = Json::parse(text);
  RankView view{json[0], json[1].get<CpuMask>(), {}, json[3], json[4]};
  for (const Json& entry : json[2]) {
    GpuInfo gpu;
    gpu.name = entry[0];
    gpu.uuid = entry[1];
    gpu.total_bytes = entry[2];
    gpu.clock_mhz = entry[3];
    gpu.memory_clock_mhz = entry[4];
    gpu.ecc = entry[5];
    view.gpus.push_back(gpu);
  }
  return view;
}

MachineFact look_at_mpi(const Communicator& comm) {
  std::vector<std::string> libraries;
  for (const std::string& text : comm.all_gather(mpi_library_version())) {
    if (std::find(libraries.begin(), libraries.end(), text) == libraries.end()) { libraries.push_back(text); }
  }
  if (libraries.size() > 1) {
    return {"mpi", Finding::failed, fmt::format("ranks load different libraries: {}", fmt::join(libraries, "; "))};
  }
#if defined(OPEN_MPI)
  // Open MPI keeps its binary interface within a major version.
  if (!libraries.front().starts_with(fmt::format("Open MPI v{}.", OMPI_MAJOR_VERSION))) {
    return {"mpi", Finding::failed,
            fmt::format("the program was built with Open MPI {}.{}.{} and loads {}", OMPI_MAJOR_VERSION, OMPI_MINOR_VERSION,
                        OMPI_RELEASE_VERSION, libraries.front())};
  }
#endif
  const std::string ranks = comm.size() == 1 ? std::string("in one process") : fmt::format("on all of {} ranks", comm.size());
  return {"mpi", Finding::passed, fmt::format("{} {}", libraries.front(), ranks)};
}

/// Which GPUs of a host reach each other's memory. That some do not is no fault: other transports connect them.
MachineFact look_at_links(const Communicator& comm) {
  std::int64_t pairs = 0;
  std::int64_t unreached = 0;
  together(comm, [&] {
    for (const GpuLink& link : gpu_links()) {
      ++pairs;
      unreached += link.peer_access ? 0 : 1;
    }
  });
  const bool any_unreached = comm.max(unreached) > 0;
  if (comm.max(pairs) == 0) { return {"peer access", Finding::absent, "no rank sees two GPUs"}; }
  return {"peer access", Finding::passed,
          any_unreached ? "not all GPUs reach each other's memory: transport p2p cannot serve all ranks"
                        : "all GPUs that a rank sees reach each other's memory"};
}

MachineFact look_at_mpi_and_cuda(const Communicator& comm, bool has_gpus) {
  const MpiCudaSupport support = mpi_cuda_support();
  const auto own = static_cast<std::int64_t>(support);
  const bool alike = comm.max(own) == comm.min(own);
  if (!has_gpus) { return {"mpi and cuda", Finding::absent, "no GPU memory that MPI could be given"}; }
  if (!alike) { return {"mpi and cuda", Finding::failed, "MPI takes device pointers on some ranks and not on others"}; }
  return {"mpi and cuda", Finding::passed,
          support == MpiCudaSupport::yes ? "MPI takes device pointers"
                                         : "MPI takes no device pointers: transport mpi stages data through pinned host memory"};
}

/// Passes messages over one transport. Where it does not connect these ranks the fact has the reason.
void look_at_transport(const Communicator& comm, Device& device, TransportKind kind, MachineCheck& check) {
  const std::string name = fmt::format("transport {}", to_string(kind));
  std::unique_ptr<Transport> transport;
  try {
    together(comm, [&] { transport = make_transport(kind, comm, device, false); });
  } catch (const AgreedError& error) {
    if (error.code() != ExitCode::bad_input) { throw; }
    check.facts.push_back({name, Finding::absent, error.what()});
    return;
  }
  const RingRate rate = measure_ring(comm, device, *transport, kMessageBytes);
  check.rates.push_back({kind, rate});
  if (rate.wrong_bytes > 0) {
    check.facts.push_back(
        {name, Finding::failed,
         fmt::format("{} wrong bytes in the messages of {} ranks, {} bytes each", rate.wrong_bytes, comm.size(), rate.bytes)});
    return;
  }
  check.facts.push_back({name, Finding::passed,
                         fmt::format("{:.2f} GB/s from each rank to the next, {:.2f} of a copy in its own memory ({:.2f} GB/s)",
                                     rate.transport_gbs, rate.transport_gbs / rate.copy_gbs, rate.copy_gbs)});
}

}  // namespace

std::string_view to_string(Finding finding) {
  switch (finding) {
    case Finding::passed:
      return "passed";
    case Finding::failed:
      return "FAILED";
    case Finding::absent:
      break;
  }
  return "absent";
}

MachineFact judge_binding(std::span<const RankView> views) {
  std::map<std::string, std::vector<CpuMask>> hosts;
  for (const RankView& view : views) { hosts[view.host].push_back(view.cpus); }
  std::set<std::string> ways;
  for (const auto& [host, masks] : hosts) {
    CpuMask all;
    bool alike = true;
    bool apart = true;
    std::int64_t fewest = count_of(masks.front());
    for (std::size_t rank = 0; rank < masks.size(); ++rank) {
      const CpuMask& mask = masks[rank];
      all.resize(std::max(all.size(), mask.size()));
      for (std::size_t word = 0; word < mask.size(); ++word) { all[word] |= mask[word]; }
      alike = alike && mask == masks.front();
      for (std::size_t other = 0; other < rank; ++other) { apart = apart && !overlap(mask, masks[other]); }
      fewest = std::min(fewest, count_of(mask));
    }
    const std::int64_t cpus = count_of(all);
    const std::int64_t ranks = std::ssize(masks);
    if (cpus < ranks) {
      return {"binding", Finding::failed,
              fmt::format("{} ranks on {} share {} {}; does the launcher know how many each needs?", ranks, host, cpus,
                          cpus == 1 ? "CPU" : "CPUs")};
    }
    if (!alike && !apart) {
      return {"binding", Finding::failed, fmt::format("the CPUs of some ranks on {} are partly those of others", host)};
    }
    ways.insert(apart ? fmt::format("each rank has CPUs of its own, {} or more", fewest)
                      : fmt::format("the {} ranks of a host are not bound and share its {} CPUs", ranks, cpus));
  }
  return {"binding", Finding::passed, fmt::format("{}", fmt::join(ways, "; "))};
}

MachineFact judge_gpus(std::span<const RankView> views) {
  std::set<std::string> blind;
  std::set<std::string> models;
  std::vector<GpuClaim> claims;
  std::map<std::string, std::int64_t> ranks_on;
  for (const RankView& view : views) {
    GpuClaim& claim = claims.emplace_back(GpuClaim{view.host, ranks_on[view.host]++, 0, {}});
    for (const GpuInfo& gpu : view.gpus) {
      claim.uuids.push_back(gpu.uuid);
      models.insert(fmt::format("{} of {} MiB", gpu.name, gpu.total_bytes >> 20));
    }
    if (view.has_hidden_gpu) {
      return {"gpus", Finding::failed, fmt::format("{} has a GPU that is not seen: {}", view.host, view.obstacle)};
    }
    if (view.gpus.empty()) { blind.insert(fmt::format("{} ({})", view.obstacle, view.host)); }
  }
  if (models.empty()) { return {"gpus", Finding::absent, fmt::format("{}", fmt::join(blind, "; "))}; }
  if (!blind.empty()) { return {"gpus", Finding::failed, fmt::format("some ranks see no GPU: {}", fmt::join(blind, "; "))}; }
  if (models.size() > 1) {
    return {"gpus", Finding::failed, fmt::format("different GPUs, of which the slowest is waited for: {}", fmt::join(models, "; "))};
  }
  for (GpuClaim& claim : claims) { claim.host_size = ranks_on[claim.host]; }
  try {
    choose_devices(claims, false);
  } catch (const InvalidArgument& error) { return {"gpus", Finding::failed, error.what()}; }
  return {"gpus", Finding::passed, fmt::format("each of {} ranks has its own, {}", views.size(), *models.begin())};
}

MachineFact judge_clocks(std::span<const RankView> views) {
  std::set<std::string> settings;
  for (const RankView& view : views) {
    for (const GpuInfo& gpu : view.gpus) {
      settings.insert(fmt::format("{} MHz, memory {} MHz, ECC {}", gpu.clock_mhz, gpu.memory_clock_mhz, gpu.ecc ? "on" : "off"));
    }
  }
  if (settings.empty()) { return {"clocks and ecc", Finding::absent, "no GPU"}; }
  if (settings.size() > 1) {
    return {"clocks and ecc", Finding::failed, fmt::format("GPUs are set differently: {}", fmt::join(settings, "; "))};
  }
  return {"clocks and ecc", Finding::passed, fmt::format("at most {}, on all GPUs", *settings.begin())};
}

bool MachineCheck::passed() const {
  return std::none_of(facts.begin(), facts.end(), [](const MachineFact& fact) { return fact.finding == Finding::failed; });
}

MachineCheck check_machine(const Communicator& comm) {
  std::string own;
  together(comm, [&] { own = packed(own_view(comm)); });
  std::vector<RankView> views;
  for (const std::string& text : comm.all_gather(own)) { views.push_back(unpacked(text)); }

  MachineCheck check;
  check.facts.push_back(look_at_mpi(comm));
  check.facts.push_back(judge_binding(views));
  const MachineFact gpus = check.facts.emplace_back(judge_gpus(views));
  check.facts.push_back(judge_clocks(views));
  check.facts.push_back(look_at_links(comm));
  const bool on_gpus = gpus.finding == Finding::passed;
  check.facts.push_back(look_at_mpi_and_cuda(comm, on_gpus));
  if (comm.size() == 1) {
    check.facts.push_back({"transports", Finding::absent, "one rank sends nothing; start it on several"});
    return check;
  }

  DeviceOptions options;
  options.kind = on_gpus ? BackendKind::cuda : BackendKind::cpu;
  if (on_gpus) { options.number = assign_gpu(comm, false); }
  std::unique_ptr<Device> device;
  together(comm, [&] { device = make_device(options); });
  std::vector<TransportKind> kinds;
  if (on_gpus) {
    kinds.push_back(TransportKind::p2p);
    if (!build_info().nccl.empty()) { kinds.push_back(TransportKind::nccl); }
  }
  kinds.push_back(TransportKind::mpi);
  for (const TransportKind kind : kinds) { look_at_transport(comm, *device, kind, check); }
  return check;
}

}  // namespace annulus
