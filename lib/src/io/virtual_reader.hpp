// SPDX-License-Identifier: Apache-2.0
// HDF5 alone opens the parts of a virtual dataset by itself, reads zeros where it cannot, checks no chunk of them, and keeps all open.
#pragma once

#include "box_reader.hpp"
#include "virtual_layout.hpp"

#include <cstddef>
#include <list>
#include <memory>
#include <vector>

namespace annulus {

/// Parts of one virtual dataset, and of virtual datasets among them, that stay open: the latest few.
class OpenParts {
 public:
  OpenParts(H5T_order_t order, SourceFiles& files) : order_(order), files_(files) {}

  /// A part and what reads it.
  struct Part {
    OpenedDataset dataset;
    std::unique_ptr<BoxReader> reader;
    bool is_virtual = false;
  };

  /// The part, opened if need be. The buffers of the one before are freed.
  std::shared_ptr<Part> get(const PartPlace& place);
  void release_buffers();
  SourceFiles& files() const { return files_; }

 private:
  struct Entry {
    PartPlace place;
    std::shared_ptr<Part> part;
  };

  H5T_order_t order_;
  SourceFiles& files_;
  std::list<Entry> latest_;        ///< the last used first
  std::shared_ptr<Part> buffers_;  ///< what may keep some
};

/// Reads a virtual dataset from its parts, each by a reader of its own.
class VirtualReader final : public BoxReader {
 public:
  VirtualReader(const DatasetPlace& place, hid_t creation, H5T_order_t order, SourceFiles& files);
  /// A part of another one, whose open parts it shares.
  VirtualReader(const DatasetPlace& place, hid_t creation, OpenParts& open);

  void read(std::span<const SlabCopy> slabs, void* out) override;
  std::optional<DecodedUnit> decoded_unit() const override { return unit_; }
  void release_buffers() override { open_.release_buffers(); }

 private:
  struct Part {
    PartPlace place;
    VirtualMapping mapping;
  };

  void find_parts(const DatasetPlace& place, hid_t creation);

  std::unique_ptr<OpenParts> own_;
  OpenParts& open_;
  std::vector<Part> parts_;
  bool overlap_ = false;  ///< parts do; their order then matters
  std::optional<DecodedUnit> unit_;
};

}  // namespace annulus
