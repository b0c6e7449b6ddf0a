// SPDX-License-Identifier: Apache-2.0
#include "launcher.hpp"

#include <fmt/format.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string_view>
#include <unistd.h>

namespace annulus::app {

namespace {

/// Of Open MPI, PMIx (Slurm, PRRTE), PMI-1 and PMI-2 (Hydra, Slurm) and PALS.
constexpr std::array<const char*, 4> kRankVariables{"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID"};
constexpr std::array<const char*, 2> kSizeVariables{"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};
constexpr std::array<const char*, 2> kLocalSizeVariables{"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"};
constexpr std::array<const char*, 5> kLocalRankVariables{"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK",
                                                         "PALS_LOCAL_RANKID", "SLURM_LOCALID"};
constexpr std::array<std::string_view, 7> kLaunchers{"mpirun", "mpiexec", "orterun", "orted", "prte", "prun", "hydra_pmi_proxy"};

template <std::size_t kCount>
const char* first_of(const std::array<const char*, kCount>& names) {
  for (const char* name : names) {
    if (const char* value = std::getenv(name)) { return value; }
  }
  return nullptr;
}

template <std::size_t kCount>
std::int64_t number_in(const std::array<const char*, kCount>& names, std::int64_t otherwise) {
  const char* text = first_of(names);
  return text == nullptr ? otherwise : std::strtoll(text, nullptr, 10);
}

std::string text_of_file(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Living children of a process; -1 if the system does not tell.
std::int64_t children_of(pid_t parent) {
  std::ifstream list(fmt::format("/proc/{0}/task/{0}/children", parent));
  std::int64_t living = 0;
  bool any = false;
  for (pid_t child = 0; list >> child; any = true) {
    const std::string stat = text_of_file(fmt::format("/proc/{}/stat", child));
    const std::size_t name_end = stat.rfind(')');
    const bool dead = name_end == std::string::npos || name_end + 2 >= stat.size() || stat[name_end + 2] == 'Z';
    living += dead ? 0 : 1;
  }
  return any ? living : -1;
}

}  // namespace

bool under_launcher() { return first_of(kRankVariables) != nullptr || first_of(kSizeVariables) != nullptr; }

std::int64_t launched_rank() { return number_in(kRankVariables, 0); }

bool first_on_host() { return !under_launcher() || number_in(kLocalRankVariables, 0) == 0; }

std::int64_t slurm_tasks() { return number_in(std::array{"SLURM_STEP_NUM_TASKS"}, 1); }

std::optional<std::string> Siblings::missing() {
  const std::int64_t expected = number_in(kLocalSizeVariables, 1);
  const pid_t parent = ::getppid();
  const std::string launcher = text_of_file(fmt::format("/proc/{}/comm", parent));
  bool known = false;
  for (const std::string_view name : kLaunchers) { known = known || launcher.starts_with(name); }
  const std::int64_t living = known ? children_of(parent) : -1;
  asked_ = living >= 0 && living < expected ? asked_ + 1 : 0;
  // About three seconds, in which a launcher has surely started all; the lowest rank speaks first and thereby ends the others.
  if (asked_ < 30 + 5 * number_in(kLocalRankVariables, 0)) { return std::nullopt; }
  return fmt::format("{} of the {} processes that {} started here ended without entering MPI; all ranks must run the same command",
                     expected - living, expected, std::string_view(launcher).substr(0, launcher.find('\n')));
}

}  // namespace annulus::app
