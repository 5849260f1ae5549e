// What DeepStream's nvinfer calls with the outputs of a detector, for the objects on a frame: parse-bbox-func-name is
// NvDsInferParseLiteDetr.  It takes models of both forms that `litedetr export` makes:
//
//   --outputs raw          pred_logits [Q, classes], pred_boxes [Q, 4] (centre and size in 0..1); any DeepStream
//   --outputs detections   labels [K] INT64, boxes [K, 4] (corners), scores [K]; a DeepStream that knows INT64.  Its
//   second
//                          input, orig_target_sizes, is set to the network's size, in which nvinfer wants the boxes
#include <nvdsinfer_custom_impl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

using Layers = std::vector<NvDsInferLayerInfo>;
using Objects = std::vector<NvDsInferObjectDetectionInfo>;

constexpr size_t kMost = 300;  // detections of a frame, as the official post-processing keeps
constexpr int kFloat32 = 0;    // of NvDsInferDataType
constexpr int kInt64 = 4;      // which older headers do not name
constexpr unsigned kCorners = 4;

bool fail(const char* what, const char* layer) {
  std::fprintf(stderr,
               "NvDsInferParseLiteDetr: %s %s. Export the model with `litedetr export`, whose outputs this parses\n",
               layer, what);
  return false;
}

// The layer of a name, or null.  DeepStream leaves the batch out of inferDims.
const NvDsInferLayerInfo* find(const Layers& layers, const char* name) {
  for (const NvDsInferLayerInfo& layer : layers)
    if (layer.layerName && std::strcmp(layer.layerName, name) == 0) return &layer;
  return nullptr;
}

// [rows, columns] of a layer's type; columns 0: any number, which it sets.
bool check(const NvDsInferLayerInfo& layer, int type, size_t& rows, unsigned& columns) {
  const NvDsInferDims& dims = layer.inferDims;
  if (int(layer.dataType) != type) return fail(type == kInt64 ? "is no INT64" : "is no FP32", layer.layerName);
  if (!layer.buffer) return fail("has no buffer", layer.layerName);
  const bool is_vector = columns == 1;
  if (dims.numDims != (is_vector ? 1u : 2u) || (columns > 1 && dims.d[1] != columns))
    return fail("has another shape than expected", layer.layerName);
  if (columns == 0) columns = dims.d[1];
  if (rows != SIZE_MAX && dims.d[0] != rows) return fail("has another length than the other outputs", layer.layerName);
  rows = dims.d[0];
  return true;
}

struct Found {
  float score;
  int64_t label;
  const float* box;
};

// Adds an object whose numbers are sound, cut to the network's input.
void add(const Found& found, float left, float top, float right, float bottom, const NvDsInferNetworkInfo& network,
         const NvDsInferParseDetectionParams& wanted, Objects& objects) {
  const auto& thresholds = wanted.perClassPreclusterThreshold;
  if (found.label < 0 || found.label >= int64_t(wanted.numClassesConfigured)) return;
  const float threshold = size_t(found.label) < thresholds.size() ? thresholds[found.label] : 0.0f;
  if (!(found.score >= threshold)) return;  // a NaN neither
  left = std::clamp(left, 0.0f, float(network.width)), right = std::clamp(right, 0.0f, float(network.width));
  top = std::clamp(top, 0.0f, float(network.height)), bottom = std::clamp(bottom, 0.0f, float(network.height));
  if (!(right > left && bottom > top)) return;
  NvDsInferObjectDetectionInfo object{};  // newer releases have further fields, which stay 0
  object.classId = unsigned(found.label);
  object.left = left, object.top = top, object.width = right - left, object.height = bottom - top;
  object.detectionConfidence = std::min(found.score, 1.0f);
  objects.push_back(object);
}

bool parse_raw(const NvDsInferLayerInfo& logit_layer, const NvDsInferLayerInfo& box_layer,
               const NvDsInferNetworkInfo& network, const NvDsInferParseDetectionParams& wanted, Objects& objects) {
  size_t queries = SIZE_MAX;
  unsigned classes = 0, corners = kCorners;
  if (!check(logit_layer, kFloat32, queries, classes) || !check(box_layer, kFloat32, queries, corners)) return false;
  const auto* logits = static_cast<const float*>(logit_layer.buffer);
  const auto* boxes = static_cast<const float*>(box_layer.buffer);
  std::vector<Found> found;
  for (size_t query = 0; query < queries; ++query)
    for (unsigned label = 0; label < classes; ++label) {
      const float score = 1 / (1 + std::exp(-logits[query * classes + label]));
      if (!std::isnan(score)) found.push_back({score, int64_t(label), boxes + query * kCorners});
    }
  const size_t count = std::min(kMost, found.size());
  std::partial_sort(found.begin(), found.begin() + count, found.end(),
                    [](const Found& a, const Found& b) { return a.score > b.score; });
  found.resize(count);
  const float width = network.width, height = network.height;
  for (const Found& one : found) {
    const float* box = one.box;  // centre and size
    add(one, (box[0] - box[2] / 2) * width, (box[1] - box[3] / 2) * height, (box[0] + box[2] / 2) * width,
        (box[1] + box[3] / 2) * height, network, wanted, objects);
  }
  return true;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) bool NvDsInferParseLiteDetr(
    const Layers& layers, const NvDsInferNetworkInfo& network, const NvDsInferParseDetectionParams& wanted,
    Objects& objects) {
  objects.clear();
  const NvDsInferLayerInfo *logits = find(layers, "pred_logits"), *raw_boxes = find(layers, "pred_boxes");
  if (logits && raw_boxes) return parse_raw(*logits, *raw_boxes, network, wanted, objects);
  const NvDsInferLayerInfo *labels = find(layers, "labels"), *boxes = find(layers, "boxes"),
                           *scores = find(layers, "scores");
  if (!labels || !boxes || !scores) return fail("are not among the outputs", "labels, boxes and scores");
  size_t count = SIZE_MAX;
  unsigned one = 1, corners = kCorners;
  if (!check(*labels, kInt64, count, one) || !check(*scores, kFloat32, count, one) ||
      !check(*boxes, kFloat32, count, corners))
    return false;
  const auto* label = static_cast<const int64_t*>(labels->buffer);
  const auto* score = static_cast<const float*>(scores->buffer);
  const auto* box = static_cast<const float*>(boxes->buffer);
  for (size_t i = 0; i < count; ++i, box += kCorners)
    add({score[i], label[i], box}, box[0], box[1], box[2], box[3], network, wanted, objects);
  return true;
}

// Called once, before the first frame, for models of more than one input.
extern "C" __attribute__((visibility("default"))) bool NvDsInferInitializeInputLayers(
    const Layers& layers, const NvDsInferNetworkInfo& network, unsigned int batch_size) {
  const NvDsInferLayerInfo* sizes = find(layers, "orig_target_sizes");
  if (!sizes || layers.size() != 1) return fail("is not the one input beside the images", "orig_target_sizes");
  size_t two = 2;
  unsigned one = 1;
  if (!check(*sizes, kInt64, two, one)) return false;
  auto* size = static_cast<int64_t*>(sizes->buffer);
  for (unsigned i = 0; i < batch_size; ++i) size[2 * i] = network.width, size[2 * i + 1] = network.height;
  return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseLiteDetr);
