// SPDX-License-Identifier: Apache-2.0
#include <annulus/session/batch_parts.hpp>

#include <annulus/device/device.hpp>
#include <annulus_test.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

using namespace annulus;

TEST_CASE("a batch beyond the memory there is runs in parts that fit") {
  const Communicator comm = Communicator::single();
  Config config;
  config.problem = {1, std::int64_t{1} << 20, 4, 4, 16, DType::fp32, false, 1.0};
  config.threads = 1;
  const std::int64_t of_one = Session(resolve(config, comm), comm).predicted_bytes();
  const std::int64_t available = make_device(DeviceOptions{})->available_bytes();
  config.problem.batch = 5 * available / (2 * of_one);  // two and a half times what there is
  REQUIRE(config.problem.batch >= 4);
  const ResolvedConfig resolved = resolve(config, comm);
  REQUIRE_THROWS_AS(Session(resolved, comm), MemoryShortage);

  BatchParts parts(resolved, comm);

  CHECK(parts.count() >= 3);
  CHECK(parts.count() <= 6);
  CHECK(parts.session(0).predicted_bytes() <= available);
  // Neighbouring parts, which together are the batch.
  std::int64_t next = 0;
  for (std::int64_t index = 0; index < parts.count(); ++index) {
    CHECK(parts.part(index).first_batch == next);
    next += parts.part(index).problem.batch;
  }
  CHECK(next == config.problem.batch);
  // Nobody's wish is replaced by another number of parts.
  Config asked = config;
  asked.part_batch = config.problem.batch;
  const ResolvedConfig whole = resolve(asked, comm);
  CHECK_THROWS_AS(BatchParts(whole, comm), MemoryShortage);
}

TEST_CASE("parts of equal problems are computed by one session") {
  const Communicator comm = Communicator::single();
  Config config;
  config.problem = {5, 20, 2, 2, 8, DType::fp32, false, 1.0};
  config.part_batch = 2;
  config.threads = 1;
  const ResolvedConfig resolved = resolve(config, comm);
  BatchParts parts(resolved, comm);
  REQUIRE(parts.count() == 3);
  const Session* first = &parts.session(0);
  const AttentionKernel* kernel = &first->kernel();
  CHECK(&parts.session(1) == first);
  CHECK(&parts.session(1).kernel() == kernel);
  CHECK(parts.session(1).cell(0).first_batch == 2);
  CHECK(parts.session(2).cell(0).problem.batch == 1);
  CHECK(parts.session(2).cell(0).first_batch == 4);
}

TEST_CASE("counts of parts add up to those of the batch") {
  RowCounts first;
  first.uncovered = 3;
  first.zero_key_shares = {0.5, 0.25};
  RowCounts second;
  second.uncovered = 1;
  second.non_finite = 2;
  second.first_non_finite = {4, 0, 1};
  second.zero_key_shares = {0.25, 0.25};
  const RowCounts sum = sum_of({{first, 3}, {second, 1}});
  CHECK(sum.uncovered == 4);
  CHECK(sum.non_finite == 2);
  CHECK(sum.first_non_finite == std::array<std::int64_t, 3>{4, 0, 1});
  CHECK(sum.zero_key_shares == std::vector<double>{0.4375, 0.25});
}
