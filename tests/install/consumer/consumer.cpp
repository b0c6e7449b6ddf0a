// SPDX-License-Identifier: Apache-2.0
// Makes plans for four ranks and prints the bytes that they move, with nothing but installed headers.
#include <annulus/core/build_info.hpp>
#include <annulus/plan/coverage.hpp>
#include <annulus/plan/plan.hpp>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

int main() {
  annulus::Problem problem;
  problem.seq_len = 32;
  problem.heads = problem.kv_heads = 1;
  const annulus::Partition partition(annulus::PartitionKind::contiguous, problem.seq_len, 4);
  std::vector<annulus::RingPlan> plans;
  for (std::int64_t rank = 0; rank < 4; ++rank) {
    plans.push_back(annulus::make_plan(problem, annulus::dense_pattern(problem.seq_len), partition, {annulus::Schedule::ring}, rank));
  }
  std::printf("annulus %s moves %lld bytes\n", std::string(annulus::build_info().version).c_str(),
              static_cast<long long>(annulus::prove_coverage(plans).bytes_moved));
  return 0;
}
