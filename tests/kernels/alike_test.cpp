// SPDX-License-Identifier: Apache-2.0
#include <annulus/kernels/alike.hpp>

#include <annulus_test.hpp>

#include <cstdint>
#include <span>
#include <vector>

using namespace annulus;
using kernels::AttendTask;
using kernels::Mask;

namespace {

/// A task that is known by its number.
AttendTask task_of(std::int64_t number, Mask mask, DType dtype = DType::bf16, std::int64_t head_dim = 64) {
  AttendTask task;
  task.q_rows = number;
  task.mask = mask;
  task.dtype = dtype;
  task.head_dim = head_dim;
  return task;
}

using Groups = std::vector<std::vector<std::int64_t>>;

Groups groups_of(const std::vector<AttendTask>& tasks) {
  Groups groups;
  std::vector<AttendTask> storage;
  kernels::for_each_alike(tasks, storage, [&](std::span<const AttendTask> alike) {
    std::vector<std::int64_t>& numbers = groups.emplace_back();
    for (const AttendTask& task : alike) {
      CHECK(kernels::tiled_alike(task, alike.front()));
      numbers.push_back(task.q_rows);
    }
  });
  return groups;
}

}  // namespace

TEST_CASE("tasks that are alike are one group in their order") {
  CHECK(groups_of({}).empty());
  CHECK(groups_of({task_of(1, Mask::none), task_of(2, Mask::none)}) == Groups{{1, 2}});
}

TEST_CASE("a mixed list is grouped by mask, causal first, each group in the order of the list") {
  CHECK(groups_of({task_of(1, Mask::none), task_of(2, Mask::causal), task_of(3, Mask::none), task_of(4, Mask::causal)}) ==
        Groups{{2, 4}, {1, 3}});
}

TEST_CASE("tasks of another dtype or head_dim are not moved past each other") {
  CHECK(groups_of({task_of(1, Mask::none), task_of(2, Mask::causal), task_of(3, Mask::causal, DType::fp32), task_of(4, Mask::none),
                   task_of(5, Mask::none, DType::bf16, 128)}) == Groups{{2}, {1}, {3}, {4}, {5}});
}

TEST_CASE("no task is left over, whatever mask or dtype it has") {
  const auto third_mask = static_cast<Mask>(kernels::kMasks.size());
  const auto fourth_dtype = static_cast<DType>(17);
  CHECK(groups_of({task_of(1, Mask::none), task_of(2, third_mask), task_of(3, Mask::causal), task_of(4, third_mask),
                   task_of(5, Mask::causal, fourth_dtype)}) == Groups{{2, 4}, {3}, {1}, {5}});
}
