// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>
#include <annulus/io/source.hpp>

#include "element_convert.hpp"
#include "hdf5_handle.hpp"
#include "hdf5_sample.hpp"
#include "hdf5_types.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <string_view>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>
#include <vector>

namespace annulus {

namespace {

/// Bytes that one call into HDF5 reads: other threads get their turn in between, and a conversion needs this much scratch.
constexpr std::int64_t kReadBytes = std::int64_t{8} << 20;

constexpr std::array<Tensor, 3> kTensors{Tensor::q, Tensor::k, Tensor::v};

/// One open dataset of the input.
struct InputDataset {
  Hdf5Handle dataset;
  Hdf5Handle type;  ///< the file's own, which is the memory type of every read
  FileDType dtype;
  std::vector<hsize_t> extents;
};

/// "[1, 8192, 9, 64]"
std::string shape_text(const std::vector<hsize_t>& extents) {
  std::string text = "[";
  for (const hsize_t extent : extents) { text += fmt::format("{}{}", text.size() == 1 ? "" : ", ", extent); }
  return text + "]";
}

/// Refuses with the system's reason what HDF5 would call "unable to open file".
void require_regular_file(const std::string& path) {
  const auto refuse = [&](int error) {
    throw InvalidArgument(fmt::format("input file '{}': {}", path, std::generic_category().message(error)));
  };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) { refuse(errno); }
  struct stat status{};
  const int error = ::fstat(descriptor, &status) == 0 ? 0 : errno;
  ::close(descriptor);
  if (error != 0) { refuse(error); }
  ANNULUS_EXPECTS(S_ISREG(status.st_mode), "input file '{}' is {}, not a regular file", path,
                  S_ISDIR(status.st_mode) ? "a folder" : "a device, pipe or socket");
}

Hdf5Handle open_file(const std::string& path) {
  require_regular_file(path);
  ANNULUS_EXPECTS(H5Fis_hdf5(path.c_str()) > 0, "input file '{}' is not an HDF5 file", path);
  const Hdf5Handle access(check_h5(H5Pcreate(H5P_FILE_ACCESS), "H5Pcreate"));
#if H5_VERSION_GE(1, 10, 7)
  // Parallel file systems are often mounted without locks; a reader can do without.
  check_h5(H5Pset_file_locking(access.get(), true, true), "H5Pset_file_locking");
#endif
  Hdf5Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()));
  if (!file) { throw InvalidArgument(fmt::format("input file '{}' is damaged or still being written: {}", path, innermost_hdf5_error())); }
  return file;
}

InputDataset open_dataset(hid_t file, const std::string& path, Tensor tensor) {
  const char* name = dataset_name(tensor);
  constexpr std::string_view kAllowed = "needed are /q [batch, seq, heads, head_dim] and /k, /v [batch, seq, kv_heads, head_dim]";
  // The link first: HDF5 calls it an error to ask whether the object behind a missing link exists.
  const bool present = H5Lexists(file, name, H5P_DEFAULT) > 0 && H5Oexists_by_name(file, name, H5P_DEFAULT) > 0;
  ANNULUS_EXPECTS(present, "input file '{}' has no dataset {}; {}", path, name, kAllowed);
  InputDataset input;
  input.dataset = Hdf5Handle(H5Oopen(file, name, H5P_DEFAULT));
  if (!input.dataset) { throw InvalidArgument(fmt::format("input file '{}': {} is damaged: {}", path, name, innermost_hdf5_error())); }
  ANNULUS_EXPECTS(H5Iget_type(input.dataset.get()) == H5I_DATASET, "input file '{}': {} is not a dataset; {}", path, name, kAllowed);

  input.type = Hdf5Handle(check_h5(H5Dget_type(input.dataset.get()), "H5Dget_type"));
  const auto recognised = recognise_dtype(input.type.get());
  ANNULUS_EXPECTS(recognised.has_value(), "input file '{}': {} holds {} values; allowed are fp32, fp16 and bf16 (16 bits, 8 of exponent)",
                  path, name, describe_hdf5_type(input.type.get()));
  input.dtype = *recognised;

  const Hdf5Handle space(check_h5(H5Dget_space(input.dataset.get()), "H5Dget_space"));
  const int rank = check_h5(H5Sget_simple_extent_ndims(space.get()), "H5Sget_simple_extent_ndims");
  ANNULUS_EXPECTS(rank == 3 || rank == 4,
                  "input file '{}': {} has {} dimensions; allowed are [batch, seq, heads, head_dim] and, for one batch entry, "
                  "[seq, heads, head_dim]",
                  path, name, rank);
  input.extents.resize(static_cast<std::size_t>(rank));
  check_h5(H5Sget_simple_extent_dims(space.get(), input.extents.data(), nullptr), "H5Sget_simple_extent_dims");
  for (const hsize_t extent : input.extents) {
    ANNULUS_EXPECTS(extent >= 1, "input file '{}': {} is {}; every extent must be at least 1", path, name, shape_text(input.extents));
    ANNULUS_EXPECTS(extent <= hsize_t{1} << 48U, "input file '{}': {} is {}; no extent may be beyond 2^48", path, name,
                    shape_text(input.extents));
  }
  return input;
}

class Hdf5Input final : public TensorSource {
 public:
  explicit Hdf5Input(const std::string& path) : path_(path) {
    const Hdf5Lock lock;
    file_ = open_file(path);
    for (const Tensor tensor : kTensors) { dataset(tensor) = open_dataset(file_.get(), path, tensor); }
    read_problem();
  }

  const Problem& problem() const override { return problem_; }
  std::string describe() const override { return fmt::format("file {}", path_); }
  std::string identity() const override { return file_identity(path_); }

  std::uint64_t fingerprint(Tensor tensor, std::int64_t part, std::int64_t parts) const override {
    const InputDataset& input = dataset(tensor);
    return sample_fingerprint({input.dataset.get(), input.type.get(), input.dtype, input.extents}, part, parts);
  }

  void read(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t count, DType dtype, void* out) const override {
    ANNULUS_EXPECTS(batch >= 0 && batch < problem_.batch && first >= 0 && count >= 0 && count <= problem_.seq_len - first,
                    "rows {}..{} of batch entry {} are outside {} of {}", first, first + count, batch, dataset_name(tensor), describe());
    const InputDataset& input = dataset(tensor);
    const std::int64_t row_elements = (tensor == Tensor::q ? problem_.heads : problem_.kv_heads) * problem_.head_dim;
    const std::int64_t chunk_rows = std::max<std::int64_t>(1, kReadBytes / (row_elements * size_of(input.dtype.dtype)));
    const bool converts = input.dtype.dtype != dtype;
    std::vector<std::byte> scratch(
        converts ? static_cast<std::size_t>(std::min(chunk_rows, count) * row_elements * size_of(input.dtype.dtype)) : 0);
    for (std::int64_t done = 0; done < count; done += chunk_rows) {
      const std::int64_t rows = std::min(chunk_rows, count - done);
      const std::int64_t elements = rows * row_elements;
      std::byte* target = static_cast<std::byte*>(out) + done * row_elements * size_of(dtype);
      std::byte* stored = converts ? scratch.data() : target;
      read_rows(input, batch, first + done, rows, stored);
      if (input.dtype.byte_swapped) { swap_bytes(input.dtype.dtype, stored, elements); }
      if (const auto bad = first_non_finite(input.dtype.dtype, stored, elements)) {
        throw InvalidArgument(fmt::format("input file '{}': {} is {}; every value must be finite", path_,
                                          element_name(tensor, batch, first + done, *bad), element_at(input.dtype.dtype, stored, *bad)));
      }
      if (!converts) { continue; }
      convert_elements(input.dtype.dtype, stored, dtype, target, elements);
      if (const auto bad = first_non_finite(dtype, target, elements)) {
        throw InvalidArgument(fmt::format("input file '{}': {} is {}, which overflows {}", path_,
                                          element_name(tensor, batch, first + done, *bad), element_at(input.dtype.dtype, stored, *bad),
                                          to_string(dtype)));
      }
    }
  }

 private:
  InputDataset& dataset(Tensor tensor) { return datasets_[static_cast<std::size_t>(tensor)]; }
  const InputDataset& dataset(Tensor tensor) const { return datasets_[static_cast<std::size_t>(tensor)]; }

  void read_problem() {
    const InputDataset& q = dataset(Tensor::q);
    const InputDataset& k = dataset(Tensor::k);
    const InputDataset& v = dataset(Tensor::v);
    for (const Tensor tensor : {Tensor::k, Tensor::v}) {
      const InputDataset& other = dataset(tensor);
      ANNULUS_EXPECTS(other.dtype.dtype == q.dtype.dtype, "input file '{}': /q is {} but {} is {}; all must have one dtype", path_,
                      to_string(q.dtype.dtype), dataset_name(tensor), to_string(other.dtype.dtype));
    }
    ANNULUS_EXPECTS(k.extents == v.extents, "input file '{}': /k is {} but /v is {}; they must have one shape", path_,
                    shape_text(k.extents), shape_text(v.extents));
    const std::size_t rank = q.extents.size();
    bool agree = k.extents.size() == rank && k.extents[rank - 1] == q.extents[rank - 1];
    for (std::size_t axis = 0; agree && axis + 2 < rank; ++axis) { agree = k.extents[axis] == q.extents[axis]; }
    ANNULUS_EXPECTS(agree, "input file '{}': /q is {} but /k and /v are {}; they may differ in their heads only", path_,
                    shape_text(q.extents), shape_text(k.extents));

    problem_.batch = rank == 4 ? static_cast<std::int64_t>(q.extents[0]) : 1;
    problem_.seq_len = static_cast<std::int64_t>(q.extents[rank - 3]);
    problem_.heads = static_cast<std::int64_t>(q.extents[rank - 2]);
    problem_.kv_heads = static_cast<std::int64_t>(k.extents[rank - 2]);
    problem_.head_dim = static_cast<std::int64_t>(q.extents[rank - 1]);
    problem_.dtype = q.dtype.dtype;
    problem_.causal = false;
    ANNULUS_EXPECTS(problem_.head_dim <= kMaxHeadDim, "input file '{}': /q is {}; head_dim (the last extent) may be at most {}", path_,
                    shape_text(q.extents), kMaxHeadDim);
    ANNULUS_EXPECTS(problem_.heads % problem_.kv_heads == 0, "input file '{}': the {} heads of /k and /v do not divide the {} heads of /q",
                    path_, problem_.kv_heads, problem_.heads);
    problem_.scale = read_scale();
    try {
      validate(problem_);
    } catch (const InvalidArgument& error) { throw InvalidArgument(fmt::format("input file '{}': {}", path_, error.what())); }
  }

  double read_scale() const {
    if (check_h5(H5Aexists_by_name(file_.get(), "/", "scale", H5P_DEFAULT), "H5Aexists_by_name") == 0) {
      return 1.0 / std::sqrt(static_cast<double>(problem_.head_dim));
    }
    const Hdf5Handle attribute(check_h5(H5Aopen_by_name(file_.get(), "/", "scale", H5P_DEFAULT, H5P_DEFAULT), "H5Aopen_by_name"));
    const auto scale = read_float_attribute(attribute.get());
    if (!scale) {
      const Hdf5Handle type(check_h5(H5Aget_type(attribute.get()), "H5Aget_type"));
      throw InvalidArgument(fmt::format("input file '{}': attribute scale ({}) is not one float of 64, 32 or 16 bits", path_,
                                        describe_hdf5_type(type.get())));
    }
    ANNULUS_EXPECTS(std::isfinite(*scale), "input file '{}': attribute scale is {}; it must be finite", path_, *scale);
    return *scale;
  }

  void read_rows(const InputDataset& input, std::int64_t batch, std::int64_t first, std::int64_t rows, void* out) const {
    const Hdf5Lock lock;
    std::vector<hsize_t> start(input.extents.size(), 0);
    std::vector<hsize_t> extent = input.extents;
    const std::size_t seq_axis = input.extents.size() - 3;
    if (seq_axis == 1) {
      start[0] = static_cast<hsize_t>(batch);
      extent[0] = 1;
    }
    start[seq_axis] = static_cast<hsize_t>(first);
    extent[seq_axis] = static_cast<hsize_t>(rows);
    const Hdf5Handle space(check_h5(H5Dget_space(input.dataset.get()), "H5Dget_space"));
    check_h5(H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr), "H5Sselect_hyperslab");
    const Hdf5Handle memory(check_h5(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr), "H5Screate_simple"));
    if (H5Dread(input.dataset.get(), input.type.get(), memory.get(), space.get(), H5P_DEFAULT, out) < 0) {
      throw RuntimeFailure(fmt::format("reading rows {}..{} of {} failed: {}", first, first + rows, describe(), innermost_hdf5_error()));
    }
  }

  /// "/q[0, 17, 3, 5]" for element `index` of rows that begin at `first`; with the dataset's own number of dimensions.
  std::string element_name(Tensor tensor, std::int64_t batch, std::int64_t first, std::int64_t index) const {
    const std::int64_t heads = tensor == Tensor::q ? problem_.heads : problem_.kv_heads;
    const std::int64_t d = index % problem_.head_dim;
    const std::int64_t h = index / problem_.head_dim % heads;
    const std::int64_t s = first + index / problem_.head_dim / heads;
    return dataset(tensor).extents.size() == 4 ? fmt::format("{}[{}, {}, {}, {}]", dataset_name(tensor), batch, s, h, d)
                                               : fmt::format("{}[{}, {}, {}]", dataset_name(tensor), s, h, d);
  }

  std::string path_;
  Hdf5Handle file_;
  std::array<InputDataset, 3> datasets_;  ///< by Tensor; closed before the file
  Problem problem_;
};

}  // namespace

std::unique_ptr<TensorSource> open_input(const std::string& path) { return std::make_unique<Hdf5Input>(path); }

}  // namespace annulus
