// SPDX-License-Identifier: Apache-2.0
// Inputs in chunks that are decoded whole: by a filter that counts how often it decodes.
#include "attention/host_load.hpp"

#include <annulus/core/error.hpp>
#include <annulus/session/check.hpp>
#include <annulus/session/session.hpp>
#include <annulus_test.hpp>

#include "io/hdf5_fixture.hpp"
#include "mpi_world.hpp"

#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

namespace {

using namespace annulus;
using test::TemporaryFolder;
using test::world;

constexpr H5Z_filter_t kFilter = 302;
std::int64_t decoded = 0;
std::int64_t fails_at = -1;  ///< which decoding of this rank fails

std::size_t count_decoding(unsigned flags, std::size_t, const unsigned*, std::size_t bytes, std::size_t*, void**) {
  if ((flags & H5Z_FLAG_REVERSE) == 0) { return bytes; }
  return decoded++ == fails_at ? 0 : bytes;
}

struct Case {
  std::vector<hsize_t> extents;
  hsize_t kv_heads;
  std::vector<hsize_t> chunk;
};

std::int64_t chunks_of(const Case& what, hsize_t heads) {
  std::int64_t chunks = 1;
  for (std::size_t axis = 0; axis < what.extents.size(); ++axis) {
    const hsize_t extent = axis + 2 == what.extents.size() ? heads : what.extents[axis];
    chunks *= static_cast<std::int64_t>((extent + what.chunk[axis] - 1) / what.chunk[axis]);
  }
  return chunks;
}

/// A file that rank 0 wrote and all ranks see.
class SharedFile {
 public:
  explicit SharedFile(const Case& what) {
    if (world().rank() == 0) {
      folder_ = std::make_unique<TemporaryFolder>();
      path_ = folder_->file("input.h5");
      test::write_filtered(path_, kFilter, what.extents, what.kv_heads, what.chunk);
    }
    path_ = world().broadcast(path_, 0);
  }
  ~SharedFile() { world().barrier(); }
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::unique_ptr<TemporaryFolder> folder_;
  std::string path_;
};

const std::vector<Case> kCases{
    {{1, 100, 4, 8}, 2, {1, 100, 1, 8}},      // one head to a chunk, as long as the sequence
    {{1, 101, 4, 8}, 2, {1, 7, 3, 5}},        // nothing divides anything
    {{5, 40, 2, 4}, 1, {2, 11, 1, 4}},        // chunks of several batch entries
    {{37, 3, 6}, 1, {5, 2, 4}},               // three dimensions
    {{1, 2, 2, 4}, 2, {1, 1, 2, 4}},          // fewer rows than ranks
    {{1, 70000, 2, 32}, 1, {1, 1000, 2, 32}}  // several bands
};

}  // namespace

TEST_CASE("the ranks of a host decode each chunk once and every rank gets its rows", "[attention][io]") {
  const test::RegisteredFilter filter(kFilter, "annulus test filter", count_decoding);
  for (const Case& what : kCases) {
    const SharedFile file(what);
    const auto source = open_input(file.path());
    const Problem& problem = source->problem();
    const Partition partition(PartitionKind::contiguous, problem.seq_len, world().size());
    std::vector<HostBox> boxes;
    for (const std::int64_t rank : world().host_ranks()) { boxes.push_back({0, problem.batch, partition.shard(rank)}); }
    for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
      REQUIRE(source->bands(tensor).has_value());
      const std::int64_t heads = tensor == Tensor::q ? problem.heads : problem.kv_heads;
      decoded = 0;
      std::int64_t rows = 0;
      bool equal = true;
      load_on_host(*source, tensor, world(), boxes,
                   [&](const TensorSource& from, Tensor which, std::int64_t batch, std::int64_t first, std::int64_t count) {
                     equal = equal && which == tensor;
                     std::vector<float> values(static_cast<std::size_t>(count * heads * problem.head_dim));
                     from.read(which, batch, first, count, DType::fp32, values.data());
                     const std::int64_t begin = (batch * problem.seq_len + first) * heads * problem.head_dim;
                     for (std::size_t i = 0; i < values.size(); ++i) {
                       equal = equal && values[i] == static_cast<float>((begin + static_cast<std::int64_t>(i)) % 4093) / 64.0F;
                     }
                     rows += count;
                   });

      CHECK(equal);
      CHECK(rows == problem.batch * partition.rows(world().rank()));
      CHECK(world().sum(decoded) == chunks_of(what, static_cast<hsize_t>(heads)));
    }
  }
}

TEST_CASE("a session decodes each chunk once on its host, alone and in virtual ranks too", "[attention][io]") {
  const test::RegisteredFilter filter(kFilter, "annulus test filter", count_decoding);
  for (const Case& what : kCases) {
    const SharedFile file(what);
    Config config;
    config.input = file.path();
    config.threads = 1;
    if (world().size() == 1) { config.virtual_ranks = 3; }
    const ResolvedConfig resolved = resolve(config, world());
    Session session(resolved, world());
    decoded = 0;

    session.load();

    CHECK(world().sum(decoded) == chunks_of(what, what.extents[what.extents.size() - 2]) + 2 * chunks_of(what, what.kv_heads));
    const auto bands = resolved.source->bands(Tensor::q);
    REQUIRE(bands.has_value());
    const std::int64_t values = std::accumulate(what.chunk.begin(), what.chunk.end(), std::int64_t{1},
                                                [](std::int64_t all, hsize_t extent) { return all * static_cast<std::int64_t>(extent); });
    CHECK(bands->chunk_bytes == values * static_cast<std::int64_t>(sizeof(float)));

    // Beside what the same problem needs without a file.
    std::int64_t reading = 0;
    for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v}) {
      const auto own = resolved.source->bands(tensor);
      REQUIRE(own.has_value());
      reading += own->bytes() + own->decoding_bytes();
      if (world().host_size() > 1) { reading += host_load_bytes(*resolved.source, tensor); }
    }
    Config generated = config;
    generated.input.clear();
    generated.problem = resolved.config.problem;
    const Session without(resolve(generated, world()), world());
    CHECK(session.predicted_bytes() == without.predicted_bytes() + reading);
  }
}

TEST_CASE("a permuted sequence is read from such inputs, each chunk by the ranks whose rows of the file are in it", "[attention][io]") {
  const test::RegisteredFilter filter(kFilter, "annulus test filter", count_decoding);
  for (const Case& what : kCases) {
    const SharedFile file(what);
    Config config;
    config.input = file.path();
    config.threads = 1;
    config.pattern.branches = {{32, 2}};
    config.pattern.order = SequenceOrder::hilbert;
    if (world().size() == 1) { config.virtual_ranks = 3; }
    const ResolvedConfig resolved = resolve(config, world());
    Session session(resolved, world());
    decoded = 0;

    session.load();

    const std::int64_t chunks = chunks_of(what, what.extents[what.extents.size() - 2]) + 2 * chunks_of(what, what.kv_heads);
    CHECK(world().sum(decoded) >= chunks);
    CHECK(world().sum(decoded) <= chunks * world().size());
    session.run();
    CHECK(check_session(session, 50).verdict.passed);
  }
}

TEST_CASE("a chunk that cannot be decoded on one rank ends all with its message", "[attention][io]") {
  const test::RegisteredFilter filter(kFilter, "annulus test filter", count_decoding);
  for (std::int64_t number = 0; number < 2 * world().size(); ++number) {
    const std::int64_t failing = number / 2;
    const SharedFile file(kCases[1]);
    Config config;
    config.input = file.path();
    config.threads = 1;
    config.pattern.order = number % 2 == 0 ? SequenceOrder::linear : SequenceOrder::hilbert;
    const ResolvedConfig resolved = resolve(config, world());
    Session session(resolved, world());
    decoded = 0;
    fails_at = world().rank() == failing ? 3 : -1;

    std::string message;
    ExitCode code = ExitCode::passed;
    try {
      session.load();
    } catch (const Error& error) {
      message = error.what();
      code = error.code();
    }

    fails_at = -1;
    CHECK_THAT(message, test::contains_text("/q at [") && test::contains_text("is damaged"));
    CHECK(code == ExitCode::bad_input);
  }
}
