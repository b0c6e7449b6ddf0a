// SPDX-License-Identifier: Apache-2.0
// How kernel cublas cuts tasks into tiles, on the host alone.
#include <annulus/kernels/built_for.hpp>
#include <annulus/kernels/cublas.hpp>
#include <annulus_test.hpp>

#include "cublas/chains.hpp"
#include "cublas/instances.hpp"
#include "cublas/share_chains.hpp"
#include "cublas/tiling.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

namespace annulus {
namespace {

using namespace kernels::cuda;
using kernels::AttendTask;
using kernels::Mask;
using kernels::TaskStrides;

class Draw {
 public:
  explicit Draw(unsigned seed) : engine_(seed) {}
  std::int64_t operator()(std::int64_t from, std::int64_t to) {
    return from + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(to - from + 1));
  }
  template <class T>
  void shuffle(T& list) {
    std::shuffle(list.begin(), list.end(), engine_);
  }

 private:
  std::mt19937 engine_;
};

/// Strides of a tensor whose axes lie in a random order, some with gaps between, so that no two elements share a place.
TaskStrides random_strides(Draw& draw, const AttendTask& task, std::int64_t rows, bool of_kv, std::int64_t innermost) {
  struct Axis {
    std::int64_t TaskStrides::* stride;
    std::int64_t count;
  };
  std::array<Axis, 5> axes{{{&TaskStrides::batch, task.batch},
                            {&TaskStrides::segment, task.segments},
                            {&TaskStrides::row, rows},
                            {&TaskStrides::kv_head, task.kv_heads},
                            {&TaskStrides::head, of_kv ? 1 : task.q_per_kv}}};
  draw.shuffle(axes);
  TaskStrides strides;
  std::int64_t next = innermost;
  for (const Axis& axis : axes) {
    if (draw(0, 3) == 0) { next += innermost * draw(1, 3); }
    strides.*axis.stride = next;
    next *= axis.count;
  }
  return strides;
}

AttendTask random_task(Draw& draw) {
  AttendTask task;
  task.dtype = draw(0, 1) == 0 ? DType::bf16 : DType::fp32;
  task.mask = draw(0, 1) == 0 ? Mask::none : Mask::causal;
  task.batch = draw(1, 3);
  task.segments = draw(1, 4);
  task.q_rows = draw(1, 300);
  task.k_rows = draw(1, 300);
  task.kv_heads = draw(1, 3);
  task.q_per_kv = draw(1, 3);
  task.head_dim = draw(0, 3) == 0 ? draw(1, 40) : 16 * draw(1, 4);
  task.q_strides = random_strides(draw, task, task.q_rows, false, task.head_dim);
  task.kv_strides = random_strides(draw, task, task.k_rows, true, task.head_dim);
  task.acc_strides = random_strides(draw, task, task.q_rows, false, task.head_dim);
  task.stat_strides = random_strides(draw, task, task.q_rows, false, 1);
  const std::int64_t stride = draw(1, 3);
  task.q_positions = {draw(0, 400), stride};
  task.k_positions = {draw(0, 400), draw(0, 3) == 0 ? draw(1, 3) : stride};
  return task;
}

CublasTiling random_tiling(Draw& draw) { return {draw(1, 8), draw(1, 700), draw(1, 300), draw(1, 300), draw(1, 200)}; }

using Offsets = std::array<std::int64_t, 4>;  // q, kv, acc, stat
Offsets list_of(const InstanceOffsets& at) { return {at.q, at.kv, at.acc, at.stat}; }

/// Every instance of a task, by what AttendTask says of its strides.
std::vector<Offsets> instances_by_definition(const AttendTask& task) {
  std::vector<Offsets> instances;
  for (std::int64_t batch = 0; batch < task.batch; ++batch) {
    for (std::int64_t segment = 0; segment < task.segments; ++segment) {
      for (std::int64_t kv_head = 0; kv_head < task.kv_heads; ++kv_head) {
        for (std::int64_t head = 0; head < task.q_per_kv; ++head) {
          const auto at = [&](const TaskStrides& strides, std::int64_t own_head) {
            return batch * strides.batch + segment * strides.segment + kv_head * strides.kv_head + own_head * strides.head;
          };
          instances.push_back({at(task.q_strides, head), at(task.kv_strides, 0), at(task.acc_strides, head), at(task.stat_strides, head)});
        }
      }
    }
  }
  return instances;
}

/// Instance number `index` of those of a map, as the device finds it.
InstanceOffsets offsets_of(const InstanceMap& map, std::int64_t index) {
  InstanceOffsets at;
  std::int64_t rest = map.first + index;
  for (int a = map.axes - 1; a >= 0; --a) {
    const InstanceAxis& axis = map.axis[a];
    at = at + (a == 0 ? rest : rest % axis.count) * axis.stride;
    rest /= axis.count;
  }
  return at;
}

bool sees(const AttendTask& task, std::int64_t row, std::int64_t key) {
  return task.mask == Mask::none ||
         task.k_positions.first + key * task.k_positions.stride <= task.q_positions.first + row * task.q_positions.stride;
}

}  // namespace

TEST_CASE("each chain has one lane, and all of its tiles are enqueued") {
  struct Counted {
    std::int64_t tiles = 0;
    std::int64_t next = 0;
    std::vector<std::size_t> lanes;
  };
  for (const std::size_t lanes : {std::size_t{1}, std::size_t{2}, std::size_t{3}, std::size_t{8}}) {
    std::vector<Counted> chains;
    for (const std::int64_t tiles : {5, 0, 1, 7, 3, 0, 4, 4, 2, 6}) { chains.push_back({tiles, 0, {}}); }
    std::vector<std::int64_t> costs(lanes, 0);
    share_chains(
        chains, lanes, [](const Counted& chain) { return chain.next < chain.tiles; },
        [&](Counted& chain, std::size_t lane) {
          ++chain.next;
          chain.lanes.push_back(lane);
          costs[lane] += 10;
          return std::int64_t{10};
        });
    for (const Counted& chain : chains) {
      CHECK(chain.next == chain.tiles);
      for (const std::size_t lane : chain.lanes) { CHECK(lane == chain.lanes.front()); }
    }
    CHECK(std::accumulate(costs.begin(), costs.end(), std::int64_t{0}) == 320);
    if (lanes == 1) { CHECK(costs[0] == 320); }
    // Until the chains run out no lane is a tile ahead of another, and the longest chain is one of seven.
    if (lanes == 2) { CHECK(std::abs(costs[0] - costs[1]) <= 70); }
  }
  std::vector<Counted> none;
  share_chains(none, 2, [](const Counted&) { return true; }, [](Counted&, std::size_t) { return std::int64_t{1}; });
}

TEST_CASE("every query of every instance meets each key that it sees once, in ascending order, in tiles that fit their memory") {
  Draw draw(1);
  int by_pointer = 0;
  int masked = 0;
  for (int i = 0; i < 400; ++i) {
    AttendTask task = random_task(draw);
    const CublasTiling tiling = random_tiling(draw);
    const LaneLayout layout = lane_layout(tiling);
    CAPTURE(i, task.batch, task.segments, task.q_rows, task.k_rows, task.kv_heads, task.q_per_kv, static_cast<int>(task.mask));
    CAPTURE(tiling.rows, tiling.q_tile, tiling.causal_q_tile, tiling.k_tile);
    std::map<Offsets, std::size_t> numbers;
    for (const Offsets& each : instances_by_definition(task)) { numbers.emplace(each, numbers.size()); }
    REQUIRE(std::ssize(numbers) == instances_of(task));

    // For each (instance, query), the key after the last one met.
    std::vector<std::vector<std::int64_t>> met(numbers.size(), std::vector<std::int64_t>(static_cast<std::size_t>(task.q_rows), 0));
    std::vector<Chain> chains;
    append_chains(task, tiling, chains);
    bool right = true;
    for (Chain& chain : chains) {
      right = right && chain.task == &task && chain.instances >= 1;
      by_pointer += chain.by_pointer ? 1 : 0;
      while (chain.k_next < chain.k_end) {
        const KeyTile tile = take_tile(chain);
        if (tile.rows == 0) { continue; }
        masked += tile.masked ? 1 : 0;
        bool hidden = false;
        for (std::int64_t instance = 0; instance < chain.instances; ++instance) {
          const auto number = numbers.find(list_of(chain.base + offsets_of(chain.map, instance)));
          REQUIRE(number != numbers.end());
          std::vector<std::int64_t>& rows = met[number->second];
          for (std::int64_t row = tile.q_begin; row < tile.q_begin + tile.rows; ++row) {
            std::int64_t& next = rows[static_cast<std::size_t>(row)];
            right = right && next == tile.k_begin;
            next = tile.k_begin + tile.cols;
            hidden = hidden || !sees(task, row, next - 1);
          }
        }
        right = right && hidden == tile.masked;
        // Positions ascend: rows from the first one that sees a key of the tile.
        right = right && sees(task, tile.q_begin, tile.k_begin);
        right = right && (tile.q_begin == chain.q_begin || !sees(task, tile.q_begin - 1, tile.k_begin));
        // The scores and the pointers of the tile lie in what is set aside for them.
        right = right && tile.cols <= tiling.k_tile && chain.instances * tile.rows <= tiling.rows;
        right = right && chain.instances * tile.rows * score_row_stride(tile.cols) * 4 <= layout.bytes - layout.scores;
        right = right && chain.instances * std::int64_t{sizeof(void*)} <= layout.q - layout.k;
      }
    }
    for (const std::vector<std::int64_t>& rows : met) {
      for (std::int64_t row = 0; row < task.q_rows; ++row) {
        const std::int64_t end = rows[static_cast<std::size_t>(row)];
        // Keys beyond the last one met are hidden from the row.
        right = right && end <= task.k_rows && (end == task.k_rows || !sees(task, row, end));
      }
    }
    CHECK(right);
    if (!right) { return; }
  }
  CHECK(by_pointer > 100);
  CHECK(masked > 100);
}

TEST_CASE("the longest chains of a causal task come first, and each begins with rows that see its first key") {
  AttendTask task;
  task.mask = Mask::causal;
  task.batch = task.segments = task.kv_heads = task.q_per_kv = 1;
  task.q_rows = task.k_rows = 1000;
  task.head_dim = 64;
  task.q_strides = task.kv_strides = task.acc_strides = {0, 0, 64, 64000, 64000};
  task.stat_strides = {0, 0, 1, 1000, 1000};
  std::vector<Chain> chains;
  append_chains(task, {1, 2048, 2048, 128, 256}, chains);

  REQUIRE(chains.size() > 1);
  for (std::size_t i = 1; i < chains.size(); ++i) { CHECK(chains[i - 1].k_end >= chains[i].k_end); }
  CHECK(chains.front().q_end == 1000);
  Chain chain = chains.front();
  CHECK(take_tile(chain).q_begin == chain.q_begin);
}

TEST_CASE("the instances of a map are those of the task, over as few axes as a whole tensor needs") {
  Draw draw(2);
  for (int i = 0; i < 2000; ++i) {
    const AttendTask task = random_task(draw);
    const InstanceMap map = instances_over(task);
    std::vector<Offsets> found;
    for (std::int64_t index = 0; index < instances_of(task); ++index) { found.push_back(list_of(offsets_of(map, index))); }
    std::vector<Offsets> expected = instances_by_definition(task);
    std::sort(found.begin(), found.end());
    std::sort(expected.begin(), expected.end());
    REQUIRE(found == expected);
    for (int a = 1; a < map.axes; ++a) { REQUIRE(map.axis[a - 1].count <= map.axis[a].count); }
  }

  // [batch, heads, rows, head_dim] without grouped heads: batch entries follow the heads at one stride.
  AttendTask task;
  task.batch = 3;
  task.segments = 1;
  task.kv_heads = 5;
  task.q_per_kv = 1;
  task.q_strides = task.kv_strides = task.acc_strides = {50 * 64, 0, 64, 10 * 64, 0};
  task.stat_strides = {50, 0, 1, 10, 0};
  const InstanceMap map = instances_over(task);
  CHECK(map.axes == 1);
  CHECK(map.axis[0].count == 15);
  CHECK(list_of(map.axis[0].stride) == Offsets{640, 640, 640, 10});

  // The heads of a group share their keys: they are no one axis with the groups.
  task.q_per_kv = 2;
  task.q_strides.head = task.acc_strides.head = 5 * 64;
  task.stat_strides.head = 5;
  CHECK(instances_over(task).axes == 2);
}

TEST_CASE("tasks that are called disjoint share no row, and tasks of other heads or offsets are called so") {
  // Rows of heads of one contiguous [batch, rows, heads, head_dim] partial, as patterns give them to tasks; some tasks lie half a head
  // beside the others.
  constexpr std::int64_t kRows = 97;
  constexpr std::int64_t kHeads = 6;
  constexpr std::int64_t kDim = 8;
  constexpr std::int64_t kHalf = kDim / 2;
  std::vector<float> memory(static_cast<std::size_t>(2 * kRows * kHeads * kDim + 2 * kDim));
  // Half a head before a multiple of its size, so that some rows go over the end of a period.
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data()) / sizeof(float);
  float* const partial = memory.data() + (2 * kDim - kHalf - static_cast<std::int64_t>(address % kDim)) % kDim;
  Draw draw(3);
  struct Drawn {
    AttendTask task;
    std::set<std::int64_t> halves;  // of rows of heads, by number
    std::int64_t rate = 0, offset = 0, first_head = 0, heads = 0, shift = 0;
  };
  const auto drawn = [&] {
    Drawn one;
    one.rate = std::array<std::int64_t, 4>{1, 2, 3, 4}[static_cast<std::size_t>(draw(0, 3))];
    one.offset = draw(0, one.rate - 1);
    const std::int64_t length = 12 * draw(1, 4);
    AttendTask& task = one.task;
    task.batch = draw(1, 2);
    task.segments = draw(1, kRows / length);
    const std::int64_t first = length * draw(0, kRows / length - task.segments) + one.offset;
    task.q_rows = draw(1, (length - one.offset + one.rate - 1) / one.rate);
    task.kv_heads = draw(1, 2);
    task.q_per_kv = draw(1, 3);
    one.heads = task.kv_heads * task.q_per_kv;
    one.first_head = draw(0, kHeads - one.heads);
    task.head_dim = kDim;
    one.shift = draw(0, 3) == 0 ? kHalf : 0;
    task.acc = partial + (first * kHeads + one.first_head) * kDim + one.shift;
    task.acc_strides = {kRows * kHeads * kDim, length * kHeads * kDim, one.rate * kHeads * kDim, task.q_per_kv * kDim, kDim};
    for (const Offsets& instance : instances_by_definition(task)) {
      for (std::int64_t row = 0; row < task.q_rows; ++row) {
        const float* at = static_cast<const float*>(task.acc) + instance[2] + row * task.acc_strides.row;
        one.halves.insert({(at - partial) / kHalf, (at - partial) / kHalf + 1});
      }
    }
    return one;
  };

  int proved = 0;
  int missed = 0;
  for (int i = 0; i < 5000; ++i) {
    const Drawn a = drawn();
    const Drawn b = drawn();
    const bool shared = std::any_of(a.halves.begin(), a.halves.end(), [&](std::int64_t half) { return b.halves.count(half) > 0; });
    const bool said = disjoint(a.task, b.task);
    CAPTURE(i, a.rate, a.offset, a.first_head, a.heads, b.rate, b.offset, b.first_head, b.heads);
    REQUIRE((!said || !shared));
    REQUIRE(said == disjoint(b.task, a.task));
    proved += said ? 1 : 0;

    if (a.shift != b.shift) { continue; }
    const bool other_heads = a.first_head + a.heads <= b.first_head || b.first_head + b.heads <= a.first_head;
    const bool other_offset = a.rate == b.rate && a.offset != b.offset;
    // Without a second row, segment or batch entry there is no stride to reason with.
    const bool has_rows = a.task.q_rows > 1 || b.task.q_rows > 1;
    const bool one_batch = a.task.batch == 1 && b.task.batch == 1;  // rows of the next entry have other residues
    if (other_heads && has_rows && !said) { ++missed; }
    if (other_offset && one_batch && a.task.q_rows > 1 && b.task.q_rows > 1 && !said) { ++missed; }
  }
  CHECK(proved > 500);
  CHECK(missed == 0);
}

TEST_CASE("tasks of any strides that are called disjoint share no element") {
  std::vector<float> memory(100000);
  Draw draw(6);
  const auto drawn = [&] {
    AttendTask task;
    task.batch = draw(1, 3);
    task.segments = draw(1, 2);
    task.q_rows = draw(1, 4);
    task.kv_heads = draw(1, 2);
    task.q_per_kv = draw(1, 2);
    task.head_dim = 4;
    task.acc_strides = random_strides(draw, task, task.q_rows, false, 4);
    task.acc = memory.data() + 4 * draw(0, 40);
    return task;
  };
  const auto elements_of = [](const AttendTask& task) {
    std::set<const float*> elements;
    for (const Offsets& instance : instances_by_definition(task)) {
      for (std::int64_t row = 0; row < task.q_rows; ++row) {
        const float* at = static_cast<const float*>(task.acc) + instance[2] + row * task.acc_strides.row;
        for (std::int64_t d = 0; d < task.head_dim; ++d) { elements.insert(at + d); }
      }
    }
    return elements;
  };

  int proved = 0;
  for (int i = 0; i < 20000; ++i) {
    const AttendTask a = drawn();
    const AttendTask b = drawn();
    if (!disjoint(a, b)) { continue; }
    ++proved;
    const std::set<const float*> elements = elements_of(a);
    for (const float* element : elements_of(b)) { REQUIRE(elements.count(element) == 0); }
  }
  CHECK(proved > 100);
}

TEST_CASE("the parts of a lane's memory lie one after the other, and a full tile fills what is its own") {
  Draw draw(4);
  for (int i = 0; i < 1000; ++i) {
    const CublasTiling tiling{draw(1, 8), draw(1, 65535), draw(1, 4096), draw(1, 4096), draw(1, 4096)};
    const LaneLayout layout = lane_layout(tiling);
    const std::array<std::int64_t, 7> ends{layout.k, layout.q, layout.v, layout.score_rows, layout.acc, layout.scores, layout.bytes};
    REQUIRE(layout.k == kLibraryWorkspaceBytes);
    for (std::size_t part = 0; part + 1 < ends.size(); ++part) {
      REQUIRE(ends[part] % 256 == 0);
      const bool is_scores = part + 2 == ends.size();
      const std::int64_t row_bytes = is_scores ? 4 * score_row_stride(tiling.k_tile) : std::int64_t{sizeof(void*)};
      REQUIRE(ends[part + 1] - ends[part] >= tiling.rows * row_bytes);
      // No more than keys rounded up to 128, and the next part's alignment.
      const std::int64_t enough = is_scores ? row_bytes + 4 * 128 : row_bytes;
      REQUIRE(ends[part + 1] - ends[part] < tiling.rows * enough + 256);
    }
    REQUIRE(CublasAttention::workspace_bytes(tiling) == tiling.streams * layout.bytes);
  }
}

TEST_CASE("the tiles of every head_dim, dtype and mask are within range, and fit the L2 cache that they are for") {
  for (const DType dtype : kernels::kBuiltDTypes) {
    for (const Mask mask : kernels::kMasks) {
      for (std::int64_t head_dim = 1; head_dim <= kernels::kLargestHeadDim; ++head_dim) {
        const CublasTiling tiling = default_tiling(head_dim, dtype, mask);
        CHECK_NOTHROW(validate(tiling));
        CHECK(tiling.streams * tiling.rows * tiling.k_tile * 4 <= std::int64_t{32} << 20);
        const auto* tuned = std::find_if(kernels::kTunedHeadDims.begin(), kernels::kTunedHeadDims.end(),
                                         [&](std::int64_t each) { return head_dim <= each; });
        REQUIRE(tuned != kernels::kTunedHeadDims.end());
        CHECK(tiling == default_tiling(*tuned, dtype, mask));
      }
    }
  }
}

TEST_CASE("tilings and tasks out of range are refused") {
  CHECK_THROWS_AS(validate(CublasTiling{0, 1, 1, 1, 1}), std::invalid_argument);
  CHECK_THROWS_AS(validate(CublasTiling{9, 1, 1, 1, 1}), std::invalid_argument);
  CHECK_THROWS_AS(validate(CublasTiling{1, 65536, 1, 1, 1}), std::invalid_argument);
  CHECK_THROWS_AS(validate(CublasTiling{1, 1, 0, 1, 1}), std::invalid_argument);
  CHECK_THROWS_AS(validate(CublasTiling{1, 1, 1, 0, 1}), std::invalid_argument);
  CHECK_THROWS_AS(validate(CublasTiling{1, 1, 1, 1, 4097}), std::invalid_argument);
  Draw draw(5);
  const AttendTask good = random_task(draw);
  CHECK_NOTHROW(validate(good));
  for (std::int64_t AttendTask::* extent : {&AttendTask::batch, &AttendTask::segments, &AttendTask::q_rows, &AttendTask::k_rows,
                                            &AttendTask::kv_heads, &AttendTask::q_per_kv, &AttendTask::head_dim}) {
    AttendTask task = good;
    task.*extent = 0;
    CHECK_THROWS_AS(validate(task), std::invalid_argument);
  }
  AttendTask wide = good;
  wide.head_dim = 257;
  CHECK_THROWS_AS(validate(wide), std::invalid_argument);
  AttendTask backwards = good;
  backwards.mask = Mask::causal;
  backwards.k_positions.stride = 0;
  CHECK_THROWS_AS(validate(backwards), std::invalid_argument);
}

}  // namespace annulus
