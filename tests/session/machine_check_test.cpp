// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/machine_check.hpp>

#include <annulus_test.hpp>

#include <string>
#include <vector>

using namespace annulus;
using annulus::test::contains_text;

namespace {

GpuInfo gpu(const std::string& uuid) {
  GpuInfo info;
  info.name = "NVIDIA H200";
  info.uuid = uuid;
  info.total_bytes = std::int64_t{143771} << 20;
  info.clock_mhz = 1980;
  info.memory_clock_mhz = 3201;
  info.ecc = true;
  return info;
}

/// Two ranks of one host, each with two CPUs of its own, which see the same two GPUs.
std::vector<RankView> two_ranks() {
  return {{"gpu07", {0b0011}, {gpu("GPU-a"), gpu("GPU-b")}, "", false}, {"gpu07", {0b1100}, {gpu("GPU-a"), gpu("GPU-b")}, "", false}};
}

std::vector<RankView> two_blind_ranks() {
  std::vector<RankView> views = two_ranks();
  for (RankView& view : views) {
    view.gpus.clear();
    view.obstacle = "this machine has no NVIDIA driver";
  }
  return views;
}

}  // namespace

TEST_CASE("ranks with CPUs and GPUs of their own pass") {
  const std::vector<RankView> views = two_ranks();

  CHECK(judge_binding(views).finding == Finding::passed);
  CHECK(judge_binding(views).text == "each rank has CPUs of its own, 2 or more");
  CHECK(judge_gpus(views).finding == Finding::passed);
  CHECK(judge_gpus(views).text == "each of 2 ranks has its own, NVIDIA H200 of 143771 MiB");
  CHECK(judge_clocks(views).finding == Finding::passed);
  CHECK(judge_clocks(views).text == "at most 1980 MHz, memory 3201 MHz, ECC on, on all GPUs");
}

TEST_CASE("ranks that share all CPUs of a host pass where there are enough, hosts being counted apart") {
  std::vector<RankView> views = two_ranks();
  views[0].cpus = views[1].cpus = {0b1111};
  views.push_back({"gpu08", {0b0001}, {}, "", false});

  CHECK(judge_binding(views).finding == Finding::passed);
  CHECK_THAT(judge_binding(views).text, contains_text("the 2 ranks of a host are not bound and share its 4 CPUs"));

  views[0].cpus = views[1].cpus = {0b0100};
  CHECK(judge_binding(views).finding == Finding::failed);
  CHECK_THAT(judge_binding(views).text, contains_text("2 ranks on gpu07 share 1 CPU;"));
}

TEST_CASE("ranks whose CPUs are partly those of others fail, whatever the lengths of their masks") {
  std::vector<RankView> views = two_ranks();
  views[0].cpus = {0b0110, 0};

  CHECK(judge_binding(views).finding == Finding::failed);
  CHECK_THAT(judge_binding(views).text, contains_text("gpu07 are partly those of others"));
}

TEST_CASE("no GPU anywhere is no fault, one on some hosts only or hidden by a broken driver is") {
  std::vector<RankView> views = two_blind_ranks();

  CHECK(judge_gpus(views).finding == Finding::absent);
  CHECK(judge_gpus(views).text == "this machine has no NVIDIA driver (gpu07)");
  CHECK(judge_clocks(views).finding == Finding::absent);

  views[0].gpus = {gpu("GPU-a")};
  CHECK(judge_gpus(views).finding == Finding::failed);
  CHECK_THAT(judge_gpus(views).text, contains_text("some ranks see no GPU: "));

  views = two_blind_ranks();
  views[1].has_hidden_gpu = true;
  CHECK(judge_gpus(views).finding == Finding::failed);
  CHECK_THAT(judge_gpus(views).text, contains_text("gpu07 has a GPU that is not seen: this machine"));
}

TEST_CASE("ranks without a GPU of their own, or with another model, fail") {
  std::vector<RankView> views = two_ranks();
  for (RankView& view : views) { view.gpus = {gpu("GPU-a")}; }

  CHECK(judge_gpus(views).finding == Finding::failed);

  views = two_ranks();
  views[1].gpus[1].name = "NVIDIA L40S";
  CHECK(judge_gpus(views).finding == Finding::failed);
  CHECK_THAT(judge_gpus(views).text, contains_text("NVIDIA H200 of 143771 MiB; NVIDIA L40S of 143771 MiB"));
}

TEST_CASE("GPUs that are clocked differently, or of which some do not correct errors, fail") {
  std::vector<RankView> views = two_ranks();
  views[1].gpus[0].ecc = false;

  CHECK(judge_clocks(views).finding == Finding::failed);
  CHECK_THAT(judge_clocks(views).text, contains_text("1980 MHz, memory 3201 MHz, ECC off; 1980 MHz, memory 3201 MHz, ECC on"));

  views = two_ranks();
  views[0].gpus[1].clock_mhz = 1755;
  CHECK(judge_clocks(views).finding == Finding::failed);
}

TEST_CASE("a machine passes unless a fact has failed") {
  MachineCheck check;
  check.facts = {{"mpi", Finding::passed, ""}, {"gpus", Finding::absent, ""}};

  CHECK(check.passed());
  check.facts.push_back({"binding", Finding::failed, ""});
  CHECK_FALSE(check.passed());
}
