// SPDX-License-Identifier: Apache-2.0
#include <annulus/attention/kernel_table.hpp>
#include <annulus/core/build_info.hpp>
#include <annulus/gpu/cuda_devices.hpp>
#include <annulus/gpu/gpu_assignment.hpp>
#include <annulus/session/machine_check.hpp>

#include "commands.hpp"
#include "report.hpp"
#include "result_text.hpp"
#include "standard_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <tuple>

namespace annulus::app {

namespace {

std::string_view text_of(MpiCudaSupport support) {
  switch (support) {
    case MpiCudaSupport::yes:
      return "CUDA-aware";
    case MpiCudaSupport::no:
      return "not CUDA-aware";
    case MpiCudaSupport::unknown:
      break;
  }
  return "does not say whether it is CUDA-aware";
}

std::string fast_text(const KernelInfo& kernel) {
  switch (kernel.fast) {
    case FastHeadDims::none:
      return "none";
    case FastHeadDims::all:
      return "all";
    case FastHeadDims::listed:
      break;
  }
  return fmt::format("{}", fmt::join(kernel.fast_head_dims, ", "));
}

std::string head_dims_text(const KernelInfo& kernel) {
  return kernel.head_dim_step == 1 ? fmt::format("1 to {}", kernel.largest_head_dim)
                                   : fmt::format("{}, {} to {}", kernel.head_dim_step, 2 * kernel.head_dim_step, kernel.largest_head_dim);
}

std::string dtypes_text(const KernelInfo& kernel) {
  std::string text;
  for (const DType dtype : kernel.dtypes) { text += fmt::format("{}{}", text.empty() ? "" : ", ", to_string(dtype)); }
  return text;
}

Json to_json(const KernelInfo& kernel) {
  Json dtypes = Json::array();
  for (const DType dtype : kernel.dtypes) { dtypes.push_back(to_string(dtype)); }
  Json fast = fast_text(kernel);
  if (kernel.fast == FastHeadDims::listed) { fast = kernel.fast_head_dims; }
  return {{"backend", to_string(kernel.backend)}, {"kernel", kernel.kernel},
          {"dtypes", std::move(dtypes)},          {"head_dims", {kernel.head_dim_step, kernel.largest_head_dim}},
          {"fast_head_dims", std::move(fast)},    {"products", kernel.products},
          {"obstacle", kernel.obstacle}};
}

/// A GPU of some host, under the number that it has in the report.
struct ListedGpu {
  std::string host;
  GpuInfo gpu;
};

/// A link between two GPUs of the report.
struct ListedLink {
  std::size_t from = 0;
  std::size_t to = 0;
  bool peer_access = false;
  std::optional<int> performance_rank;
  std::optional<bool> native_atomics;
};

/// Where a rank runs.
struct Place {
  std::string host;
  std::optional<std::size_t> gpu;  ///< in the report; of backend cuda
  int device = 0;                  ///< its CUDA device number in that process
};

/// What all ranks see of the machine, each GPU once.
struct Machine {
  std::vector<ListedGpu> gpus;  ///< by host and PCI address
  std::vector<ListedLink> links;
  std::vector<Place> ranks;
  std::set<std::pair<std::string, std::string>> obstacles;  ///< (host, why a rank there sees no GPU)
  std::string unassigned;                                   ///< why backend cuda could not give each rank a GPU of its own; or empty
};

/// What this rank sees, as text for the others.
std::string describe_own(const Communicator& comm) {
  Json gpus = Json::array();
  for (const GpuInfo& gpu : visible_gpus()) {
    gpus.push_back({gpu.name, gpu.uuid, gpu.pci, gpu.compute_major, gpu.compute_minor, gpu.multiprocessors, gpu.l2_bytes, gpu.total_bytes,
                    gpu.clock_mhz, gpu.memory_clock_mhz, gpu.ecc});
  }
  Json links = Json::array();
  for (const GpuLink& link : gpu_links()) {
    links.push_back({link.from, link.to, link.peer_access, link.performance_rank ? Json(*link.performance_rank) : Json(),
                     link.native_atomics ? Json(*link.native_atomics) : Json()});
  }
  return Json{{"host", comm.host()},     {"host_rank", comm.host_rank()}, {"host_size", comm.host_size()},
              {"gpus", std::move(gpus)}, {"links", std::move(links)},     {"obstacle", gpu_obstacle()}}
      .dump();
}

GpuInfo gpu_from(const Json& json) {
  GpuInfo gpu;
  gpu.name = json[0];
  gpu.uuid = json[1];
  gpu.pci = json[2];
  gpu.compute_major = json[3];
  gpu.compute_minor = json[4];
  gpu.multiprocessors = json[5];
  gpu.l2_bytes = json[6];
  gpu.total_bytes = json[7];
  gpu.clock_mhz = json[8];
  gpu.memory_clock_mhz = json[9];
  gpu.ecc = json[10];
  return gpu;
}

Machine assemble(const std::vector<std::string>& seen) {
  Machine machine;
  std::vector<Json> views;
  std::map<std::tuple<std::string, std::string, std::string>, GpuInfo> gpus;  // by host, PCI address, UUID
  std::vector<GpuClaim> claims;
  for (const std::string& text : seen) {
    const Json& view = views.emplace_back(Json::parse(text));
    GpuClaim& claim = claims.emplace_back(GpuClaim{view["host"], view["host_rank"], view["host_size"], {}});
    for (const Json& entry : view["gpus"]) {
      const GpuInfo gpu = gpu_from(entry);
      gpus.emplace(std::tuple(claim.host, gpu.pci, gpu.uuid), gpu);
      claim.uuids.push_back(gpu.uuid);
    }
    if (claim.uuids.empty()) { machine.obstacles.emplace(claim.host, view["obstacle"]); }
  }
  std::map<std::pair<std::string, std::string>, std::size_t> number;  // by host and UUID
  for (const auto& [key, gpu] : gpus) {
    number[{std::get<0>(key), gpu.uuid}] = machine.gpus.size();
    machine.gpus.push_back({std::get<0>(key), gpu});
  }
  std::map<std::pair<std::size_t, std::size_t>, ListedLink> links;
  for (std::size_t rank = 0; rank < views.size(); ++rank) {
    const GpuClaim& claim = claims[rank];
    const auto gpu_of = [&](const Json& device) { return number.at({claim.host, claim.uuids.at(device.get<std::size_t>())}); };
    for (const Json& entry : views[rank]["links"]) {
      ListedLink link{gpu_of(entry[0]), gpu_of(entry[1]), entry[2], std::nullopt, std::nullopt};
      if (!entry[3].is_null()) { link.performance_rank = entry[3]; }
      if (!entry[4].is_null()) { link.native_atomics = entry[4]; }
      links.emplace(std::pair(link.from, link.to), link);
    }
    machine.ranks.push_back({claim.host, std::nullopt, 0});
  }
  for (const auto& [ends, link] : links) { machine.links.push_back(link); }
  if (!machine.obstacles.empty()) { return machine; }
  std::vector<int> devices;
  try {
    devices = choose_devices(claims, false);
  } catch (const InvalidArgument& error) {
    machine.unassigned = error.what();
    return machine;
  }
  for (std::size_t rank = 0; rank < devices.size(); ++rank) {
    const std::string& uuid = claims[rank].uuids[static_cast<std::size_t>(devices[rank])];
    machine.ranks[rank].gpu = number.at({claims[rank].host, uuid});
    machine.ranks[rank].device = devices[rank];
  }
  return machine;
}

std::string compute_text(const GpuInfo& gpu) { return fmt::format("{}.{}", gpu.compute_major, gpu.compute_minor); }

Json to_json(const Machine& machine) {
  Json gpus = Json::array();
  for (const auto& [host, gpu] : machine.gpus) {
    gpus.push_back({{"host", host},
                    {"name", gpu.name},
                    {"uuid", gpu.uuid},
                    {"pci", gpu.pci},
                    {"compute_capability", compute_text(gpu)},
                    {"multiprocessors", gpu.multiprocessors},
                    {"l2_bytes", gpu.l2_bytes},
                    {"memory_bytes", gpu.total_bytes},
                    {"clock_mhz", gpu.clock_mhz},
                    {"memory_clock_mhz", gpu.memory_clock_mhz},
                    {"ecc", gpu.ecc}});
  }
  Json links = Json::array();
  for (const ListedLink& link : machine.links) {
    links.push_back({{"from", machine.gpus[link.from].gpu.uuid},
                     {"to", machine.gpus[link.to].gpu.uuid},
                     {"peer_access", link.peer_access},
                     {"performance_rank", link.performance_rank ? Json(*link.performance_rank) : Json()},
                     {"native_atomics", link.native_atomics ? Json(*link.native_atomics) : Json()}});
  }
  Json ranks = Json::array();
  for (std::size_t rank = 0; rank < machine.ranks.size(); ++rank) {
    const Place& place = machine.ranks[rank];
    Json entry{{"rank", rank}, {"host", place.host}, {"gpu", Json()}, {"device", Json()}};
    if (place.gpu) {
      entry["gpu"] = machine.gpus[*place.gpu].gpu.uuid;
      entry["device"] = place.device;
    }
    ranks.push_back(std::move(entry));
  }
  Json obstacles = Json::array();
  for (const auto& [host, reason] : machine.obstacles) { obstacles.push_back({{"host", host}, {"reason", reason}}); }
  return {{"gpus", std::move(gpus)},
          {"links", std::move(links)},
          {"ranks", std::move(ranks)},
          {"no_gpu", std::move(obstacles)},
          {"unassigned", machine.unassigned}};
}

/// "yes 0 a": peer access, performance rank, native atomics.
std::string link_text(const ListedLink& link) {
  std::string text = link.peer_access ? "yes" : "no";
  if (link.performance_rank) { text += fmt::format(" {}", *link.performance_rank); }
  if (link.native_atomics.value_or(false)) { text += " a"; }
  return text;
}

void print_links(const Machine& machine) {
  if (machine.links.empty()) {
    if (machine.gpus.size() > 1) { say("\nlinks between GPUs: no process sees two of one host\n"); }
    return;
  }
  say("\nlinks between GPUs, from the row's to the column's: peer access, the link's performance rank (0: the fastest of its machine),\n"
      "a: native atomics; -: no process sees both\n");
  const std::size_t count = machine.gpus.size();
  std::vector<std::string> cells(count * count, "-");
  for (const ListedLink& link : machine.links) { cells[link.from * count + link.to] = link_text(link); }
  say("{:>4}", "");
  for (std::size_t to = 0; to < count; ++to) { say("  {:<8}", to); }
  say("\n");
  for (std::size_t from = 0; from < count; ++from) {
    say("{:>4}", from);
    for (std::size_t to = 0; to < count; ++to) { say("  {:<8}", from == to ? std::string(".") : cells[from * count + to]); }
    say("\n");
  }
}

void print_machine(const Machine& machine) {
  say("\n");
  for (const auto& [host, reason] : machine.obstacles) { say("no GPU: {} ({})\n", reason, host); }
  if (!machine.gpus.empty()) {
    std::size_t host_width = 4;
    std::size_t name_width = 4;
    for (const auto& [host, gpu] : machine.gpus) {
      host_width = std::max(host_width, host.size());
      name_width = std::max(name_width, gpu.name.size());
    }
    say("{:>4}  {:<{}}  {:<{}}  {:<40}  {:<12}  {:>7}  {:>4}  {:>11}\n", "gpu", "host", host_width, "name", name_width, "uuid", "pci",
        "compute", "SMs", "memory");
    for (std::size_t index = 0; index < machine.gpus.size(); ++index) {
      const auto& [host, gpu] = machine.gpus[index];
      say("{:>4}  {:<{}}  {:<{}}  {:<40}  {:<12}  {:>7}  {:>4}  {:>11}\n", index, host, host_width, gpu.name, name_width, gpu.uuid, gpu.pci,
          compute_text(gpu), gpu.multiprocessors, human_bytes(gpu.total_bytes));
    }
  }
  print_links(machine);
  say("\n");
  for (std::size_t rank = 0; rank < machine.ranks.size(); ++rank) {
    const Place& place = machine.ranks[rank];
    const char* without = machine.gpus.empty() ? "no GPU" : "no GPU of its own";
    const std::string gpu = place.gpu ? fmt::format("gpu {} (device {} of the process)", *place.gpu, place.device) : std::string(without);
    say("rank {:<6} {}  {}\n", rank, place.host, gpu);
  }
  if (!machine.unassigned.empty()) { say("backend cuda: {}\n", machine.unassigned); }
}

void print_kernels(const std::vector<KernelInfo>& kernels) {
  std::size_t dims_width = 10;
  std::size_t fast_width = 13;
  for (const KernelInfo& kernel : kernels) {
    dims_width = std::max(dims_width, head_dims_text(kernel).size() + 1);
    fast_width = std::max(fast_width, fast_text(kernel).size() + 1);
  }
  const auto row = [&](std::string_view backend, std::string_view kernel, const std::string& dtypes, const std::string& dims,
                       const std::string& fast, const std::string& products) {
    say("{:<10} {:<7} {:<17} {:<{}} {:<{}} {}\n", backend, kernel, dtypes, dims, dims_width, fast, fast_width, products);
  };
  say("\n");
  row("backend", "kernel", "dtypes", "head dims", "fast for", "products");
  for (const KernelInfo& kernel : kernels) {
    row(to_string(kernel.backend), kernel.kernel, dtypes_text(kernel), head_dims_text(kernel), fast_text(kernel), kernel.products);
    if (!kernel.obstacle.empty()) { say("{:<10} does not run here: {}\n", "", kernel.obstacle); }
  }
}

Json to_json(const MachineCheck& check) {
  Json facts = Json::array();
  for (const MachineFact& fact : check.facts) {
    facts.push_back({{"name", fact.name}, {"finding", to_string(fact.finding)}, {"text", fact.text}});
  }
  Json rates = Json::array();
  for (const auto& [transport, rate] : check.rates) {
    rates.push_back({{"transport", to_string(transport)},
                     {"bytes", rate.bytes},
                     {"gbs", rate.transport_gbs},
                     {"copy_gbs", rate.copy_gbs},
                     {"wrong_bytes", rate.wrong_bytes}});
  }
  return {{"passed", check.passed()}, {"facts", std::move(facts)}, {"rates", std::move(rates)}};
}

void print_check(const MachineCheck& check) {
  say("\n");
  std::vector<std::string> failed;
  for (const MachineFact& fact : check.facts) {
    say("{:<7} {:<14} {}\n", to_string(fact.finding), fact.name, fact.text);
    if (fact.finding == Finding::failed) { failed.push_back(fact.name); }
  }
  if (failed.empty()) {
    say("PASS the machine is fit\n");
  } else {
    say("FAIL {}\n", fmt::join(failed, ", "));
  }
}

}  // namespace

ExitCode execute_info(const Invocation& invocation, const Communicator& comm) {
  if (!invocation.config.result.empty()) {
    together(comm, [&] {
      if (comm.rank() == 0) { say("{}", result_text(invocation.config.result, invocation.json)); }
    });
    return ExitCode::passed;
  }
  const BuildInfo& build = build_info();
  std::string own;
  together(comm, [&] { own = describe_own(comm); });
  const std::vector<std::string> seen = comm.all_gather(own);
  std::optional<MachineCheck> check;
  if (invocation.config.check) { check = check_machine(comm); }
  const ExitCode code = check && !check->passed() ? ExitCode::check_failed : ExitCode::passed;
  if (comm.rank() != 0) { return code; }
  const Machine machine = assemble(seen);
  const std::vector<KernelInfo> kernels = kernel_table();
  std::vector<std::string> backends{"reference", "cpu"};
  std::vector<std::string> transports{"self", "loopback", "mpi"};
  if (!build.cuda.empty()) {
    backends.emplace_back("cuda");
    transports.emplace_back("p2p");
  }
  if (!build.nccl.empty()) { transports.emplace_back("nccl"); }
  const std::string driver = cuda_driver_version();
  if (invocation.json) {
    Json json{{"version", build.version},
              {"git", build.git},
              {"compiler", build.compiler},
              {"build_type", build.build_type},
              {"cpu_gemm", build.cpu_gemm}};
    json["mpi"] = mpi_library_version();
    json["mpi_cuda_aware"] = Json();
    if (mpi_cuda_support() != MpiCudaSupport::unknown) { json["mpi_cuda_aware"] = mpi_cuda_support() == MpiCudaSupport::yes; }
    json["hdf5"] = build.hdf5;
    json["cuda"] = build.cuda;
    json["cuda_driver"] = driver;
    json["nccl"] = build.nccl;
    json["backends"] = backends;
    json["transports"] = transports;
    json["kernels"] = Json::array();
    for (const KernelInfo& kernel : kernels) { json["kernels"].push_back(to_json(kernel)); }
    json.update(to_json(machine));
    if (check) { json["check"] = to_json(*check); }
    say("{}\n", json.dump(2));
    return code;
  }
  say("annulus {} ({}), {} {}\n", build.version, build.git, build.compiler, build.build_type);
  say("mpi         {}, {}\n", mpi_library_version(), text_of(mpi_cuda_support()));
  say("hdf5        {}{}\n", build.hdf5, build.hdf5_parallel ? " (parallel)" : " (serial)");
  say("cuda        {}{}\n", build.cuda.empty() ? std::string("not compiled") : fmt::format("{} for {}", build.cuda, build.cuda_archs),
      driver.empty() ? std::string{} : fmt::format(", driver for {}", driver));
  say("nccl        {}\n", build.nccl.empty() ? std::string_view("not compiled") : build.nccl);
  say("backends    {}\ntransports  {}\n", fmt::join(backends, ", "), fmt::join(transports, ", "));
  print_kernels(kernels);
  print_machine(machine);
  if (check) { print_check(*check); }
  return code;
}

}  // namespace annulus::app
