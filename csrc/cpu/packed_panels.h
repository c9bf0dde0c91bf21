// How a convolution's weights are cut into panels, and panels that are kept: unpacked once, beside their bits.
#pragma once

#include "packed_conv2d.h"

#include <algorithm>
#include <cstring>

namespace qkernels {

constexpr int64_t kLanes = 16;                             // output channels in a vector
constexpr int64_t kMostVectors = kBlockChannels / kLanes;  // vectors of output channels in a tile
constexpr int64_t kPanelBytes = 384 << 10;                 // that a block of several panels has at most

// How a panel walks the depth of a window: `count` contiguous runs of `steps` steps each, in the panel followed by rows
// of zeros up to `panel_steps`.
struct Depth {
  int64_t count, steps, panel_steps;
};

// How the output channels of a group are cut into panels of a multiple of 16 channels, and blocks of panels.
struct ChannelCut {
  int64_t channels, panel_channels, panels, block_panels, blocks;

  // At least `wanted` blocks of `groups` groups, if there are as many panels.
  ChannelCut(int64_t most_vectors, int64_t group_channels, int64_t channel_bytes, int64_t groups, int64_t wanted)
      : channels(group_channels) {
    const int64_t vectors = (channels + kLanes - 1) / kLanes;
    panels = (vectors + most_vectors - 1) / most_vectors;
    panel_channels = (vectors + panels - 1) / panels * kLanes;
    panels = (channels + panel_channels - 1) / panel_channels;
    const int64_t fitting = kPanelBytes / (panel_channels * channel_bytes), even = panels * groups / wanted;
    block_panels = std::clamp<int64_t>(std::min(fitting, even), 1, panels);
    blocks = (panels + block_panels - 1) / block_panels;
  }
};

// A record of a member: a header that says how its panels are laid out, the panels of all groups, the sum of each
// channel's codes. A convolution takes a record if it would lay out panels of its own in this way.
struct PanelRecords {
  static constexpr int64_t kAlignment = 64, kMagic = 0x31736c656e6170;  // "panels1"

  int64_t header[kAlignment / sizeof(int64_t)];
  int64_t group_panels, panel_bytes, sums, bytes;  // where a record's sums are, and its size

  PanelRecords(const ChannelCut& cut, const Depth& depth, int64_t step_bytes, const Sizes& s)
      : header{kMagic, cut.panel_channels, cut.panels, depth.count, depth.steps, depth.panel_steps, s.out_channels,
               s.groups},
        group_panels(cut.panels), panel_bytes(cut.panel_channels * depth.count * depth.panel_steps * step_bytes),
        sums(kAlignment + s.groups * group_panels * panel_bytes),
        bytes((sums + s.out_channels * 4 + kAlignment - 1) / kAlignment * kAlignment) {}

  bool are_in(const PackedWeights& weights, int64_t members) const {
    if (weights.records == nullptr || weights.record_bytes != bytes ||
        reinterpret_cast<uintptr_t>(weights.records) % kAlignment != 0)
      return false;
    for (int64_t member = 0; member < members; ++member)
      if (std::memcmp(weights.records + member * bytes, header, sizeof header) != 0) return false;
    return true;
  }
  int64_t panel_at(int64_t member, int64_t group, int64_t panel) const {
    return member * bytes + kAlignment + (group * group_panels + panel) * panel_bytes;
  }
  int64_t sums_at(int64_t member) const { return member * bytes + sums; }
};

}  // namespace qkernels
