// SPDX-License-Identifier: Apache-2.0
#include "fused_problem.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <utility>

namespace annulus::fused_test {
namespace {

using kernels::Mask;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Rows of a segment that a rank owns, as indices [begin, end) of the segment's rows.
struct Part {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  bool empty() const { return begin >= end; }
};

std::vector<Part> parts_of(const Segment& segment, const Problem& problem) {
  std::vector<Part> parts;
  const auto below = [&](std::int64_t token) {
    return std::clamp<std::int64_t>((token - segment.first + segment.rate - 1) / segment.rate, 0, segment.count);
  };
  for (std::int64_t p = 0; p < problem.ranks; ++p) {
    parts.push_back({below(problem.seq_len * p / problem.ranks), below(problem.seq_len * (p + 1) / problem.ranks)});
  }
  return parts;
}

float value_of(DType dtype, std::uint16_t bits) {
  return dtype == DType::fp16 ? kernels::from_fp16_bits(bits) : kernels::from_bf16_bits(bits);
}

}  // namespace

Problem plain(std::int64_t batch, std::int64_t seq_len, std::int64_t heads, std::int64_t head_dim, bool causal) {
  Problem problem;
  problem.batch = batch;
  problem.seq_len = seq_len;
  problem.heads = heads;
  problem.kv_heads = heads;
  problem.head_dim = head_dim;
  problem.causal = causal;
  problem.branches = {{seq_len, 1, 0, heads}};
  return problem;
}

std::vector<Segment> segments_of(const Problem& problem) {
  const std::int64_t group = problem.heads / problem.kv_heads;
  std::vector<Segment> segments;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (const Branch& branch : problem.branches) {
      for (std::int64_t start = 0; start < problem.seq_len; start += branch.segment_length) {
        const std::int64_t end = std::min(start + branch.segment_length, problem.seq_len);
        if (branch.rate == 1) {
          segments.push_back({b, branch.first_kv_head * group, branch.kv_heads * group, start, 1, end - start});
          continue;
        }
        for (std::int64_t h = branch.first_kv_head; h < branch.first_kv_head + branch.kv_heads; ++h) {
          const std::int64_t first = start + h % branch.rate;
          if (first >= end) { continue; }
          segments.push_back({b, h * group, group, first, branch.rate, (end - first + branch.rate - 1) / branch.rate});
        }
      }
    }
  }
  return segments;
}

Steps steps_of(const Problem& problem) {
  Steps steps;
  for (const Segment& segment : segments_of(problem)) {
    const std::vector<Part> parts = parts_of(segment, problem);
    for (std::int64_t p = 0; p < problem.ranks; ++p) {
      const Part own = parts[as_size(p)];
      if (own.empty()) { continue; }
      // Ranks whose keys these rows meet, in the order in which a ring brings them.
      std::vector<std::pair<Part, kernels::KeyPart>> keys;
      for (std::int64_t i = 0; i < problem.ranks; ++i) {
        const std::int64_t from = (p - i + problem.ranks) % problem.ranks;
        if (!parts[as_size(from)].empty() && !(problem.causal && from > p)) {
          keys.emplace_back(parts[as_size(from)], kernels::KeyPart::all);
        }
      }
      const bool halves = keys.size() > 1 && problem.order == fused::KeyOrder::cyclic && !problem.causal;
      if (halves) {
        keys.front().second = kernels::KeyPart::down;
        keys.emplace_back(own, kernels::KeyPart::above);
      }
      for (std::size_t i = 0; i < keys.size(); ++i) {
        const auto& [part, which] = keys[i];
        fused::Record record;
        record.q_first = segment.first + own.begin * segment.rate;
        record.k_first = segment.first + part.begin * segment.rate;
        record.q_stride = record.k_stride = segment.rate;
        record.q_rows = static_cast<std::int32_t>(own.end - own.begin);
        record.k_rows = static_cast<std::int32_t>(part.end - part.begin);
        record.q = 0;
        record.kv = 1;
        record.q_batch = record.k_batch = static_cast<std::int32_t>(segment.batch);
        record.q_per_kv = static_cast<std::int32_t>(problem.heads / problem.kv_heads);
        record.q_head = static_cast<std::int32_t>(segment.first_head);
        record.q_head_step = record.q_per_kv;
        record.k_head = record.q_head / record.q_per_kv;
        record.kv_heads = static_cast<std::int32_t>(segment.heads) / record.q_per_kv;
        record.diagonal = static_cast<std::int32_t>(own.begin - part.begin);
        record.partial = steps.partials;
        record.mask = problem.causal && i == 0 ? Mask::causal : Mask::none;
        record.part = which;
        record.order = problem.order;
        record.first = i == 0;
        record.last = i + 1 == keys.size();
        if (steps.records.size() <= i) { steps.records.resize(i + 1); }
        steps.records[i].push_back(record);
      }
      steps.partials += segment.heads * ((own.end - own.begin + fused::kGroupRows - 1) / fused::kGroupRows);
    }
  }
  return steps;
}

double scale_of(const Problem& problem) {
  return problem.scale != 0.0 ? problem.scale : 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
}

double flops_of(const Problem& problem) {
  double flops = 0.0;
  for (const Segment& segment : segments_of(problem)) {
    const auto rows = static_cast<double>(segment.count);
    const double pairs = problem.causal ? rows * rows / 2 : rows * rows;
    flops += 4.0 * static_cast<double>(problem.head_dim * segment.heads) * pairs;
  }
  return flops;
}

Device::Device(const Problem& problem, DeviceMemory q, DeviceMemory k, DeviceMemory v, Values values)
    : problem_(problem),
      q_(std::move(q)),
      k_(std::move(k)),
      v_(std::move(v)),
      out_(problem.batch * problem.seq_len * problem.heads * problem.head_dim * 2),
      lse_(problem.batch * problem.seq_len * problem.heads * 4),
      partial_(0),
      ticket_(4),
      values_(std::move(values)) {
  must(cudaMemset(ticket_.get(), 0, 4), "clear");
  int device = 0;
  must(cudaGetDevice(&device), "device");
  must(cudaDeviceGetAttribute(&blocks_, cudaDevAttrMultiProcessorCount, device), "attribute");
  const auto tensor = [&](const DeviceMemory& memory, std::int64_t heads) {
    return fused::contiguous(memory.get(), problem.batch, problem.seq_len, heads, problem.head_dim);
  };
  const std::vector<fused::Operand> operands{tensor(q_, problem.heads), tensor(k_, problem.kv_heads), tensor(v_, problem.kv_heads)};
  const Steps steps = steps_of(problem);
  if (steps.records.size() > 1) {
    // A tile stores the partial of all its warpgroups' rows, so the last may reach past the end.
    partial_ = DeviceMemory(fused::partial_bytes(problem.head_dim, steps.partials));
  }
  for (const auto& records : steps.records) {
    for (const fused::TileList& list : fused::make_tiles(records, operands, problem.head_dim)) {
      const auto count = static_cast<std::int32_t>(list.tiles.size());
      Step step{fused::Launcher(list, operands, problem.dtype, problem.head_dim), DeviceMemory(list.tiles), DeviceMemory(count * 8LL),
                count};
      must(cudaMemset(step.redo.get(), 0, as_size(step.redo.bytes())), "clear");
      steps_.push_back(std::move(step));
    }
  }
  poison(0xFF);
}

Device::Device(const Problem& problem, const Noise& noise)
    : Device(problem, repeated(noise, problem.dtype, problem.batch * problem.seq_len * problem.heads * problem.head_dim, 0),
             repeated(noise, problem.dtype, problem.batch * problem.seq_len * problem.kv_heads * problem.head_dim, 12345),
             repeated(noise, problem.dtype, problem.batch * problem.seq_len * problem.kv_heads * problem.head_dim, 67890),
             {[&noise](std::int64_t i) { return noise.at(i); }, [&noise](std::int64_t i) { return noise.at(i + 12345); },
              [&noise](std::int64_t i) { return noise.at(i + 67890); }}) {}

Device::Device(const Problem& problem, const std::vector<std::uint16_t>& q, const std::vector<std::uint16_t>& k,
               const std::vector<std::uint16_t>& v)
    : Device(problem, DeviceMemory(q), DeviceMemory(k), DeviceMemory(v),
             {[q, d = problem.dtype](std::int64_t i) { return value_of(d, q[as_size(i)]); },
              [k, d = problem.dtype](std::int64_t i) { return value_of(d, k[as_size(i)]); },
              [v, d = problem.dtype](std::int64_t i) { return value_of(d, v[as_size(i)]); }}) {}

void Device::poison(int byte) {
  must(cudaMemset(out_.get(), byte, as_size(out_.bytes())), "poison");
  must(cudaMemset(lse_.get(), byte, as_size(lse_.bytes())), "poison");
  if (partial_.bytes() > 0) { must(cudaMemset(partial_.get(), byte, as_size(partial_.bytes())), "poison"); }
  must(cudaDeviceSynchronize(), "poison");
}

void Device::run(cudaStream_t stream, unsigned long long* cycles) {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    fused::Arguments args{};
    args.tiles = step.tiles.get<fused::Tile>();
    args.tile_count = step.count;
    args.ticket_base = drawn_;
    args.ticket = ticket_.get<std::int32_t>();
    args.redo = step.redo.get<std::uint32_t>();
    args.cycles = cycles == nullptr ? nullptr : cycles + i;
    args.out = out_.get();
    args.lse = lse_.get<float>();
    args.partial = partial_.get();
    args.scale_log2 = static_cast<float>(scale_of(problem_) * 1.4426950408889634);
    args.head_dim = static_cast<std::int32_t>(problem_.head_dim);
    drawn_ += step.launcher.launch(args, blocks_, stream);
  }
}

Error compare(const Problem& problem, const Device& device, std::int64_t samples, std::uint32_t seed) {
  const std::vector<Segment> segments = segments_of(problem);
  const auto out = device.out().host<std::uint16_t>();
  const auto lse = device.lse().host<float>();
  const Values& values = device.values();
  const std::int64_t d = problem.head_dim;
  const std::int64_t group = problem.heads / problem.kv_heads;
  const double scale = scale_of(problem);

  struct Sample {
    std::size_t segment;
    std::int64_t head;
    std::int64_t row;
  };
  std::vector<Sample> chosen;
  if (samples == 0) {
    for (std::size_t s = 0; s < segments.size(); ++s) {
      for (std::int64_t h = 0; h < segments[s].heads; ++h) {
        for (std::int64_t i = 0; i < segments[s].count; ++i) { chosen.push_back({s, segments[s].first_head + h, i}); }
      }
    }
  } else {
    std::mt19937 engine(seed);
    const auto draw = [&](std::int64_t below) { return static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(below)); };
    for (std::int64_t i = 0; i < samples; ++i) {
      const std::size_t s = as_size(draw(static_cast<std::int64_t>(segments.size())));
      const Segment& segment = segments[s];
      const std::int64_t row = i % 4 == 0 ? segment.count - 1 - draw(std::min<std::int64_t>(segment.count, 3)) : draw(segment.count);
      chosen.push_back({s, segment.first_head + draw(segment.heads), row});
    }
  }

  Error error;
  double difference = 0.0;
  double norm = 0.0;
  std::vector<double> scores;
  std::vector<double> expected(as_size(d));
  for (const Sample& sample : chosen) {
    const Segment& segment = segments[sample.segment];
    const auto element = [&](std::int64_t i, std::int64_t head, std::int64_t heads) {
      return ((segment.batch * problem.seq_len + segment.first + i * segment.rate) * heads + head) * d;
    };
    const std::int64_t keys = problem.causal ? sample.row + 1 : segment.count;
    const std::int64_t q_at = element(sample.row, sample.head, problem.heads);
    scores.resize(as_size(keys));
    double largest = -kInfinity;
    for (std::int64_t j = 0; j < keys; ++j) {
      const std::int64_t k_at = element(j, sample.head / group, problem.kv_heads);
      double dot = 0.0;
      for (std::int64_t e = 0; e < d; ++e) { dot += static_cast<double>(values.q(q_at + e)) * static_cast<double>(values.k(k_at + e)); }
      scores[as_size(j)] = dot * scale;
      largest = std::max(largest, scores[as_size(j)]);
    }
    double sum = 0.0;
    std::fill(expected.begin(), expected.end(), 0.0);
    for (std::int64_t j = 0; j < keys; ++j) {
      const double weight = std::exp(scores[as_size(j)] - largest);
      sum += weight;
      if (weight == 0.0) { continue; }
      const std::int64_t v_at = element(j, sample.head / group, problem.kv_heads);
      for (std::int64_t e = 0; e < d; ++e) { expected[as_size(e)] += weight * static_cast<double>(values.v(v_at + e)); }
    }
    for (std::int64_t e = 0; e < d; ++e) {
      const double want = expected[as_size(e)] / sum;
      const double got = static_cast<double>(value_of(problem.dtype, out[as_size(q_at + e)]));
      if (std::isfinite(want) != std::isfinite(got)) {
        ++error.misplaced;
        continue;
      }
      if (!std::isfinite(want)) { continue; }
      difference += (got - want) * (got - want);
      norm += want * want;
    }
    const std::int64_t token = segment.first + sample.row * segment.rate;
    const double got = static_cast<double>(lse[as_size((segment.batch * problem.heads + sample.head) * problem.seq_len + token)]);
    const double want = largest + std::log(sum);
    if (std::isfinite(want) != std::isfinite(got)) {
      ++error.misplaced;
    } else if (std::isfinite(want)) {
      error.lse = std::max(error.lse, std::abs(got - want));
    }
    ++error.rows;
  }
  error.relative_rms = norm > 0.0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  return error;
}

}  // namespace annulus::fused_test
