// SPDX-License-Identifier: Apache-2.0
#include "hdf5_types.hpp"

#include <annulus/core/enums.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstring>

namespace annulus {

static_assert(std::endian::native == std::endian::little, "files are little endian and memory types equal file types");

namespace {

/// Bit positions of an IEEE-like float.
struct FloatFields {
  std::size_t bytes;
  std::size_t sign;
  std::size_t exponent_at;
  std::size_t exponent_bits;
  std::size_t mantissa_bits;  ///< at bit 0, leading 1 implied
  std::size_t bias;

  bool operator==(const FloatFields&) const = default;
};

constexpr FloatFields kFp64Fields{8, 63, 52, 11, 52, 1023};

constexpr FloatFields fields_of(DType dtype) {
  switch (dtype) {
    case DType::fp16:
      return {2, 15, 10, 5, 10, 15};
    case DType::bf16:
      return {2, 15, 7, 8, 7, 127};
    case DType::fp32:
      break;
  }
  return {4, 31, 23, 8, 23, 127};
}

/// The fields of a plain float type; nothing for any other class, padded floats, or byte orders such as VAX.
std::optional<FloatFields> read_fields(hid_t type) {
  if (H5Tget_class(type) != H5T_FLOAT) { return std::nullopt; }
  FloatFields fields{};
  std::size_t mantissa_at = 0;
  fields.bytes = H5Tget_size(type);
  check_h5(H5Tget_fields(type, &fields.sign, &fields.exponent_at, &fields.exponent_bits, &mantissa_at, &fields.mantissa_bits),
           "H5Tget_fields");
  fields.bias = H5Tget_ebias(type);
  const H5T_order_t order = H5Tget_order(type);
  const bool plain = mantissa_at == 0 && H5Tget_offset(type) == 0 && H5Tget_precision(type) == 8 * fields.bytes &&
                     H5Tget_norm(type) == H5T_NORM_IMPLIED && (order == H5T_ORDER_LE || order == H5T_ORDER_BE);
  return plain ? std::optional(fields) : std::nullopt;
}

template <class Word>
Word byte_swapped(Word word) {
  auto bytes = std::bit_cast<std::array<std::byte, sizeof(Word)>>(word);
  std::ranges::reverse(bytes);
  return std::bit_cast<Word>(bytes);
}

template <class Word>
void swap_words(void* elements, std::int64_t count) {
  auto* bytes = static_cast<std::byte*>(elements);
  for (std::int64_t i = 0; i < count; ++i, bytes += sizeof(Word)) {
    Word word;
    std::memcpy(&word, bytes, sizeof word);
    word = byte_swapped(word);
    std::memcpy(bytes, &word, sizeof word);
  }
}

}  // namespace

const char* dataset_name(Tensor tensor) {
  switch (tensor) {
    case Tensor::q:
      return "/q";
    case Tensor::k:
      return "/k";
    case Tensor::k_extra:
      return "/k_extra";
    case Tensor::v_extra:
      return "/v_extra";
    case Tensor::v:
      return "/v";
    case Tensor::dout:
      break;
  }
  return "/do";
}

Hdf5Handle make_hdf5_type(DType dtype) {
  const Hdf5Lock lock;
  Hdf5Handle type(check_h5(H5Tcopy(H5T_IEEE_F32LE), "H5Tcopy"));
  const FloatFields fields = fields_of(dtype);
  // Fields first: a type cannot shrink below the fields that it has.
  check_h5(H5Tset_fields(type.get(), fields.sign, fields.exponent_at, fields.exponent_bits, 0, fields.mantissa_bits), "H5Tset_fields");
  check_h5(H5Tset_size(type.get(), fields.bytes), "H5Tset_size");
  check_h5(H5Tset_ebias(type.get(), fields.bias), "H5Tset_ebias");
  return type;
}

std::optional<FileDType> recognise_dtype(hid_t type) {
  const Hdf5Lock lock;
  const auto fields = read_fields(type);
  if (!fields) { return std::nullopt; }
  for (const auto& [dtype, name] : EnumNames<DType>::values) {
    if (*fields == fields_of(dtype)) { return FileDType{dtype, H5Tget_order(type) == H5T_ORDER_BE}; }
  }
  return std::nullopt;
}

std::string describe_hdf5_type(hid_t type) {
  const Hdf5Lock lock;
  const std::size_t bits = 8 * H5Tget_size(type);
  switch (static_cast<int>(H5Tget_class(type))) {
    case H5T_FLOAT:
      return fmt::format("{}-bit float", bits);
    case H5T_INTEGER:
      return fmt::format("{}-bit {}integer", bits, H5Tget_sign(type) == H5T_SGN_NONE ? "unsigned " : "");
    case H5T_STRING:
      return "string";
    case H5T_COMPOUND:
      return "compound";
    case H5T_ENUM:
      return "enumeration";
    case H5T_ARRAY:
      return "array";
    case H5T_VLEN:
      return "variable-length";
    default:
      return fmt::format("{}-bit non-float", bits);
  }
}

std::optional<double> read_float_attribute(hid_t attribute) {
  const Hdf5Lock lock;
  const Hdf5Handle type(check_h5(H5Aget_type(attribute), "H5Aget_type"));
  const Hdf5Handle space(check_h5(H5Aget_space(attribute), "H5Aget_space"));
  if (H5Sget_simple_extent_npoints(space.get()) != 1) { return std::nullopt; }
  const bool swapped = H5Tget_order(type.get()) == H5T_ORDER_BE;
  if (const auto fields = read_fields(type.get()); fields == kFp64Fields) {
    std::uint64_t bits = 0;
    check_h5(H5Aread(attribute, type.get(), &bits), "H5Aread");
    return std::bit_cast<double>(swapped ? byte_swapped(bits) : bits);
  }
  const auto recognised = recognise_dtype(type.get());
  if (!recognised) { return std::nullopt; }
  return kernels::with_element(recognised->dtype, [&](auto tag) -> double {
    check_h5(H5Aread(attribute, type.get(), &tag), "H5Aread");
    if (swapped) { swap_bytes(recognised->dtype, &tag, 1); }
    return static_cast<double>(kernels::to_float(tag));
  });
}

void swap_bytes(DType dtype, void* elements, std::int64_t count) {
  if (size_of(dtype) == 2) {
    swap_words<std::uint16_t>(elements, count);
  } else {
    swap_words<std::uint32_t>(elements, count);
  }
}

}  // namespace annulus
