// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/result_file.hpp>

#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>

#include "complete_dataset.hpp"
#include "hdf5_file.hpp"
#include "hdf5_handle.hpp"
#include "hdf5_open.hpp"
#include "hdf5_read.hpp"
#include "hdf5_types.hpp"
#include "hdf5_write.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <filesystem>
#include <memory>
#include <vector>

namespace annulus {

namespace {

constexpr std::int64_t kWriteBytes = std::int64_t{8} << 20;  ///< of generated rows at a time
/// Room for what is written at the end beside columns: provenance and HDF5's own tables.
constexpr std::int64_t kTailBytes = std::int64_t{32} << 10;

void write_attribute(const Hdf5File& file, const char* name, hid_t type, const void* value) {
  const Hdf5Handle space(check_h5(H5Screate(H5S_SCALAR), "H5Screate"));
  const Hdf5Handle attribute(check_h5(H5Acreate2(file.get(), name, type, space.get(), H5P_DEFAULT, H5P_DEFAULT), "H5Acreate2"));
  check_h5(H5Awrite(attribute.get(), type, value), "H5Awrite");
}

hsize_t extent_of(std::int64_t value) { return static_cast<hsize_t>(value); }

/// /rows/first_non_finite has its place where there is one, or may be later.
void make_counts(const Hdf5File& file, const RowCounts& counts, bool later = false) {
  write_dataset(file, "/rows/uncovered", H5T_STD_I64LE, {}, &counts.uncovered);
  write_dataset(file, "/rows/non_finite", H5T_STD_I64LE, {}, &counts.non_finite);
  if (!counts.zero_key_shares.empty()) {
    write_dataset(file, "/rows/zero_key_shares", H5T_IEEE_F64LE, {counts.zero_key_shares.size()}, counts.zero_key_shares.data());
  }
  if (counts.non_finite == 0 && !later) { return; }
  write_dataset(file, "/rows/first_non_finite", H5T_STD_I64LE, {counts.first_non_finite.size()}, counts.first_non_finite.data());
}

}  // namespace

struct ResultFile::Impl {
  Impl(const std::string& path, bool force, const Problem& wanted, std::int64_t table_bytes, std::int64_t features, ResultTensors tensors)
      : problem(wanted), embed(features), place(path, force), file(place) {
    const Hdf5Lock lock;
    output_type = make_hdf5_type(problem.dtype);
    lse_type = make_hdf5_type(DType::fp32);
    output = create_dataset(file.get(), output_name(), output_type.get(), output_extents());
    lse = create_dataset(file.get(), "/lse", lse_type.get(), lse_extents());
    if (tensors == ResultTensors::gradients) {
      for (Gradient& gradient : gradients) {
        gradient.dataset = create_dataset(file.get(), gradient.name, output_type.get(), extents_of(gradient));
        gradient.row_heads_left = problem.batch * row_heads(gradient);
      }
    }
    file.reserve_allocated(kTailBytes + table_bytes);
  }

  /// Opens an unfinished result.
  Impl(const std::string& path, bool force, const ResumableFile& unfinished, const Problem& wanted, std::int64_t features,
       ResultTensors tensors)
      : problem(wanted), embed(features), resumed(true), place(path, force, unfinished), file(Hdf5File::open(place)) {
    const Hdf5Lock lock;
    output_type = make_hdf5_type(problem.dtype);
    lse_type = make_hdf5_type(DType::fp32);
    output = open_rows(output_name(), output_type, output_extents());
    lse = open_rows("/lse", lse_type, lse_extents());
    if (tensors == ResultTensors::gradients) {
      for (Gradient& gradient : gradients) {
        gradient.dataset = open_rows(gradient.name, output_type, extents_of(gradient));
        gradient.row_heads_left = problem.batch * row_heads(gradient);
      }
    }
  }

  /// What the loss changes by with one of the inputs.
  struct Gradient {
    Tensor tensor;
    const char* name;
    Hdf5Handle dataset;
    std::int64_t row_heads_left = 0;
  };

  Extents extents_of(const Gradient& gradient) const {
    return {extent_of(problem.batch), extent_of(problem.seq_len), extent_of(heads_of(problem, gradient.tensor)),
            extent_of(problem.head_dim)};
  }
  /// Of a batch entry.
  std::int64_t row_heads(const Gradient& gradient) const { return problem.seq_len * heads_of(problem, gradient.tensor); }

  Extents output_extents() const {
    if (embed > 0) { return {extent_of(problem.batch), extent_of(problem.seq_len), extent_of(embed)}; }
    return {extent_of(problem.batch), extent_of(problem.seq_len), extent_of(problem.heads), extent_of(problem.head_dim)};
  }
  Extents lse_extents() const { return {extent_of(problem.batch), extent_of(problem.heads), extent_of(problem.seq_len)}; }

  Hdf5Handle open_rows(const std::string& name, const Hdf5Handle& type, const Extents& extents) const {
    Hdf5Handle dataset(H5Dopen2(file.get(), name.c_str(), H5P_DEFAULT));
    ANNULUS_EXPECTS(dataset && annulus::extents_of(dataset.get()) == extents, "{}: {} in '{}' is not that of this problem", file.describe(),
                    name, place.temporary());
    const Hdf5Handle stored(check_h5(H5Dget_type(dataset.get()), "H5Dget_type"));
    ANNULUS_EXPECTS(H5Tequal(stored.get(), type.get()) > 0, "{}: {} in '{}' is of another dtype", file.describe(), name, place.temporary());
    return dataset;
  }

  const char* output_name() const { return embed > 0 ? "/y" : "/o"; }

  void require_inside(const char* dataset, const ResultBox& box, std::int64_t heads) const {
    ANNULUS_EXPECTS(
        box.batch >= 0 && box.batch < problem.batch && box.first >= 0 && box.count >= 0 && box.count <= problem.seq_len - box.first &&
            box.first_head >= 0 && box.heads >= 1 && box.heads <= heads - box.first_head,
        "rows {}..{} of batch entry {}, heads {}..{}, are outside {} of batch {}, seq_len {}, heads {}", box.first, box.first + box.count,
        box.batch, box.first_head, box.first_head + box.heads, dataset, problem.batch, problem.seq_len, heads);
  }

  Problem problem;
  std::int64_t embed;  ///< of /y, or 0
  bool resumed = false;
  UnfinishedPath place;
  Hdf5File file;
  Hdf5Handle output_type;
  Hdf5Handle lse_type;
  Hdf5Handle output;
  Hdf5Handle lse;
  std::array<Gradient, 3> gradients{{{Tensor::q, "/dq", {}}, {Tensor::k, "/dk", {}}, {Tensor::v, "/dv", {}}}};
  std::int64_t output_row_heads = 0;  ///< heads of rows that are written so far, over all batch entries
  std::int64_t lse_row_heads = 0;

  void close() {
    const Hdf5Lock lock;
    for (Gradient& gradient : gradients) {
      if (gradient.dataset) { close_dataset(file, gradient.dataset); }
    }
    close_dataset(file, output);
    close_dataset(file, lse);
    file.commit();
  }
};

ColumnValues read_result(const std::string& path, const std::string& column) {
  const Hdf5Lock lock;
  const std::string what = fmt::format("result file '{}'", path);
  const ReadableFile file(what, path);
  return read_column(file.get(), file.state().bytes, what, column).column.values;
}

std::string unfinished_result_path(const std::string& path) { return path + ".unfinished"; }

ResultFile::ResultFile(const std::string& path, bool force, const Problem& problem, std::int64_t table_bytes, std::int64_t embed,
                       ResultTensors tensors) {
  validate(problem);
  impl_ = before_work([&] { return std::make_unique<Impl>(path, force, problem, table_bytes, embed, tensors); });
}

ResultFile::ResultFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::unique_ptr<ResultFile> ResultFile::resume(const std::string& path, bool force, const Problem& problem, std::int64_t embed,
                                               ResultTensors tensors) {
  validate(problem);
  const ResumableFile unfinished{unfinished_result_path(path)};
  return std::unique_ptr<ResultFile>(
      new ResultFile(before_work([&] { return std::make_unique<Impl>(path, force, unfinished, problem, embed, tensors); })));
}

ResultFile::~ResultFile() = default;

void ResultFile::write_output(const ResultBox& box, const void* rows) {
  impl_->require_inside(impl_->output_name(), box, impl_->problem.heads);
  if (box.count == 0) { return; }
  const Hdf5Lock lock;
  if (impl_->embed > 0) {
    ANNULUS_EXPECTS(box.heads == impl_->problem.heads, "rows of /y are of all {} heads, not of {}", impl_->problem.heads, box.heads);
    write_block(impl_->file, impl_->output, impl_->output_type.get(), {extent_of(box.batch), extent_of(box.first), 0},
                {1, extent_of(box.count), extent_of(impl_->embed)}, rows);
    impl_->output_row_heads += box.count * box.heads;
    return;
  }
  write_block(impl_->file, impl_->output, impl_->output_type.get(),
              {extent_of(box.batch), extent_of(box.first), extent_of(box.first_head), 0},
              {1, extent_of(box.count), extent_of(box.heads), extent_of(impl_->problem.head_dim)}, rows);
  impl_->output_row_heads += box.count * box.heads;
}

void ResultFile::write_gradient(Tensor tensor, const ResultBox& box, const void* rows) {
  const auto gradient =
      std::find_if(impl_->gradients.begin(), impl_->gradients.end(), [&](const auto& each) { return each.tensor == tensor; });
  ANNULUS_EXPECTS(gradient != impl_->gradients.end(), "a result has no gradient of {}", dataset_name(tensor));
  impl_->require_inside(gradient->name, box, heads_of(impl_->problem, tensor));
  if (box.count == 0) { return; }
  const Hdf5Lock lock;
  write_block(impl_->file, gradient->dataset, impl_->output_type.get(),
              {extent_of(box.batch), extent_of(box.first), extent_of(box.first_head), 0},
              {1, extent_of(box.count), extent_of(box.heads), extent_of(impl_->problem.head_dim)}, rows);
  gradient->row_heads_left -= box.count * box.heads;
}

void ResultFile::write_lse(const ResultBox& box, const float* lse) {
  impl_->require_inside("/lse", box, impl_->problem.heads);
  if (box.count == 0) { return; }
  const Hdf5Lock lock;
  write_block(impl_->file, impl_->lse, impl_->lse_type.get(), {extent_of(box.batch), extent_of(box.first_head), extent_of(box.first)},
              {1, extent_of(box.heads), extent_of(box.count)}, lse);
  impl_->lse_row_heads += box.count * box.heads;
}

void ResultFile::write_columns(const std::string& folder, std::span<const std::int64_t> extents, std::span<const NamedColumn> columns) {
  const Hdf5Lock lock;
  annulus::write_columns(impl_->file, folder, Extents(extents.begin(), extents.end()), columns);
}

void ResultFile::write_counts(const RowCounts& counts) {
  const Hdf5Lock lock;
  if (impl_->resumed) {
    write_again(impl_->file, "/rows/uncovered", std::vector{counts.uncovered});
    write_again(impl_->file, "/rows/non_finite", std::vector{counts.non_finite});
    write_again(impl_->file, "/rows/first_non_finite", std::vector(counts.first_non_finite.begin(), counts.first_non_finite.end()));
    if (!counts.zero_key_shares.empty()) { write_again(impl_->file, "/rows/zero_key_shares", counts.zero_key_shares); }
    return;
  }
  make_counts(impl_->file, counts);
}

void ResultFile::write_provenance(const std::vector<std::pair<std::string, std::string>>& entries) {
  const Hdf5Lock lock;
  for (const auto& [name, value] : entries) { write_string(impl_->file, "/provenance/" + name, value); }
}

void ResultFile::write_row(const std::string& column, std::int64_t index, const ColumnValues& values) {
  const Hdf5Lock lock;
  annulus::write_row(impl_->file, column, index, values);
}

ColumnValues ResultFile::read_column(const std::string& column) const {
  const Hdf5Lock lock;
  hsize_t bytes = 0;
  check_h5(H5Fget_filesize(impl_->file.get(), &bytes), "H5Fget_filesize");
  return annulus::read_column(impl_->file.get(), checked_narrow<std::int64_t>(bytes), impl_->file.describe(), column).column.values;
}

void ResultFile::count_written(std::int64_t entries) {
  const std::int64_t row_heads = entries * impl_->problem.seq_len * impl_->problem.heads;
  impl_->output_row_heads += row_heads;
  impl_->lse_row_heads += row_heads;
  for (Impl::Gradient& gradient : impl_->gradients) {
    if (gradient.dataset) { gradient.row_heads_left -= entries * impl_->row_heads(gradient); }
  }
}

void ResultFile::sync() { impl_->file.sync(); }

void ResultFile::commit() {
  const std::int64_t row_heads = impl_->problem.batch * impl_->problem.seq_len * impl_->problem.heads;
  ANNULUS_EXPECTS(impl_->output_row_heads == row_heads && impl_->lse_row_heads == row_heads,
                  "{} is incomplete: {} heads of rows of {} and {} of /lse were written, not {}", impl_->file.describe(),
                  impl_->output_row_heads, impl_->output_name(), impl_->lse_row_heads, row_heads);
  for (const Impl::Gradient& gradient : impl_->gradients) {
    ANNULUS_EXPECTS(gradient.row_heads_left == 0, "{} is incomplete: {} heads of rows of {} were not written", impl_->file.describe(),
                    gradient.row_heads_left, gradient.name);
  }
  impl_->close();
}

void ResultFile::create_resumable(const std::string& path, bool force, const Problem& problem, std::int64_t embed, ResultTensors tensors,
                                  std::span<const ColumnTable> tables, std::int64_t zero_key_branches,
                                  const std::vector<std::pair<std::string, std::string>>& provenance) {
  validate(problem);
  check_result_path(path, force);
  const std::string unfinished = unfinished_result_path(path);
  if (std::filesystem::exists(unfinished)) {
    ANNULUS_EXPECTS(force, "'{}' was left by a run that did not end: --resume goes on with it, --force begins anew", unfinished);
    const UnfinishedPath not_in_use(path, force, ResumableFile{unfinished});
  }
  before_work([&] {
    Impl impl(unfinished, force, problem, 0, embed, tensors);
    const Hdf5Lock lock;
    for (const ColumnTable& table : tables) {
      annulus::write_columns(impl.file, table.folder, Extents(table.extents.begin(), table.extents.end()), table.columns);
    }
    RowCounts none;
    none.zero_key_shares.resize(static_cast<std::size_t>(zero_key_branches));
    make_counts(impl.file, none, true);
    for (const auto& [name, value] : provenance) { write_string(impl.file, "/provenance/" + name, value); }
    impl.file.reserve_allocated(0);
    impl.close();
  });
}

void write_generated_input(const std::string& path, bool force, const Problem& problem, std::uint64_t seed, int threads) {
  const auto generator = make_generator(problem, seed, threads);
  const Hdf5Lock lock;
  UnfinishedPath place(path, force);
  const auto created = before_work([&] { return std::make_unique<Hdf5File>(place); });
  Hdf5File& file = *created;
  {
    const Hdf5Handle type = make_hdf5_type(problem.dtype);
    write_attribute(file, "scale", H5T_IEEE_F64LE, &problem.scale);
    write_attribute(file, "seed", H5T_STD_U64LE, &seed);
    if (!problem.kv_lengths.empty()) {
      write_dataset(file, "kv_lengths", H5T_STD_I64LE, {extent_of(problem.batch)}, problem.kv_lengths.data());
    }
    struct Target {
      Tensor tensor;
      Hdf5Handle dataset;
    };
    std::vector<Target> targets;
    for (const Tensor tensor : tensors_of(problem)) {
      targets.push_back({tensor, create_dataset(file.get(), dataset_name(tensor), type.get(),
                                                {extent_of(problem.batch), extent_of(rows_of(problem, tensor)),
                                                 extent_of(heads_of(problem, tensor)), extent_of(problem.head_dim)})});
    }
    before_work([&] { file.reserve_allocated(0); });
    for (Target& target : targets) {
      const std::int64_t bytes = row_bytes(problem, target.tensor);
      const std::int64_t all_rows = rows_of(problem, target.tensor);
      const std::int64_t chunk = std::min(all_rows, std::max<std::int64_t>(1, kWriteBytes / bytes));
      std::vector<std::byte> rows(static_cast<std::size_t>(chunk * bytes));
      for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
        for (std::int64_t first = 0; first < all_rows; first += chunk) {
          const std::int64_t count = std::min(chunk, all_rows - first);
          generator->read(target.tensor, batch, first, count, problem.dtype, rows.data());
          write_block(file, target.dataset, type.get(), {extent_of(batch), extent_of(first), 0, 0},
                      {1, extent_of(count), extent_of(heads_of(problem, target.tensor)), extent_of(problem.head_dim)}, rows.data());
        }
      }
      close_dataset(file, target.dataset);
    }
  }
  file.commit();
}

}  // namespace annulus
