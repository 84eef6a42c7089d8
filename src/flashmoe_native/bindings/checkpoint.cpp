// _native.Format, Checkpoint. Python has validated the files; what is checked here is only that the
// table fits together, so that no read can leave its buffer.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "experts/slots.h"
#include "model/needs.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flashmoe {
namespace {

using Extents = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

std::vector<Extent> to_extents(const Extents& array) {
  std::vector<Extent> result(array.shape(0));
  const int64_t* row = array.data();
  for (Extent& extent : result) {
    extent = {static_cast<int>(row[0]), row[1], row[2]};
    row += 3;
  }
  return result;
}

// A path's bytes: its text need not be UTF-8.
std::string to_path(nb::handle path) {
  PyObject* encoded = nullptr;
  if (!PyUnicode_FSConverter(path.ptr(), &encoded)) throw nb::python_error();
  const nb::bytes bytes = nb::steal<nb::bytes>(encoded);
  return {static_cast<const char*>(bytes.data()), bytes.size()};
}

int64_t total_length(const std::vector<Extent>& extents) {
  int64_t total = 0;
  for (const Extent& extent : extents) total += extent.length;
  return total;
}

// Texts and lists come as Python has them: nanobind's conversions to those of C++ end the program
// where memory does.
void add_matrix(CheckpointSpec& spec, const char* text, const Format& format,
                const nb::sequence& parts) {
  const std::string name = text;
  require(static_cast<int>(nb::len(parts)) == format.parts(), name + ": wrong number of parts");
  MatrixSpec matrix{format, {}};
  for (int part = 0; part < format.parts(); ++part) {
    matrix.parts[part] = to_extents(nb::cast<Extents>(parts[part]));
    require(total_length(matrix.parts[part]) == format.part_bytes(part),
            name + ": extents and shape disagree");
  }
  spec.matrices[name] = std::move(matrix);
}

void add_vector(CheckpointSpec& spec, const char* text, int64_t length, const char* dtype,
                const Extents& extents, bool plus_one) {
  const std::string name = text;
  VectorSpec vector{length, parse_dtype(dtype), to_extents(extents), plus_one};
  require(total_length(vector.extents) == length * static_cast<int64_t>(size_of(vector.dtype)),
          name + ": extents and length disagree");
  spec.vectors[name] = std::move(vector);
}

void add_experts(CheckpointSpec& spec, const Format& gate, const Format& up, const Format& down,
                 const Extents& extents) {
  ExpertsSpec experts{gate, up, down, to_extents(extents)};
  const int parts = experts.parts();
  require(experts.extents.size() % parts == 0, "experts: extents are not a multiple of parts");
  std::vector<int64_t> lengths;
  for (const Format* format : {&gate, &up, &down}) {
    for (int part = 0; part < format->parts(); ++part) lengths.push_back(format->part_bytes(part));
  }
  for (size_t i = 0; i < experts.extents.size(); ++i) {
    require(experts.extents[i].length == lengths[i % parts], "experts: extent and shape disagree");
  }
  spec.experts.push_back(std::move(experts));
}

nb::dict needs(const CheckpointSpec& checkpoint, const nb::dict& config, const char* backend,
               const char* precision, int threads, int64_t cache_bytes, int chunk,
               int64_t context) {
  const Setting setting{backend, precision, threads, cache_bytes, chunk, {}, false};
  const Needs found = needs_of(to_config(config, checkpoint), checkpoint, setting, context);
  nb::dict result;
  result["resident"] = found.resident;
  result["mapped"] = found.mapped;
  result["slots"] = found.slots;
  result["all_slots"] = found.all_slots;
  result["slot"] = found.slot;
  result["activations"] = found.activations;
  result["recurrent"] = found.recurrent;
  result["token"] = found.token;
  result["state"] = found.state;
  result["scratch"] = found.scratch;
  return result;
}

}  // namespace

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

ModelConfig to_config(const nb::dict& values, const CheckpointSpec& checkpoint) {
  ModelConfig config;
  const std::pair<const char*, int*> numbers[] = {
      {"hidden_size", &config.hidden_size},
      {"vocab_size", &config.vocab_size},
      {"num_attention_heads", &config.num_attention_heads},
      {"num_key_value_heads", &config.num_key_value_heads},
      {"head_dim", &config.head_dim},
      {"rotary_dim", &config.rotary_dim},
      {"linear_num_key_heads", &config.linear_num_key_heads},
      {"linear_num_value_heads", &config.linear_num_value_heads},
      {"linear_key_head_dim", &config.linear_key_head_dim},
      {"linear_value_head_dim", &config.linear_value_head_dim},
      {"linear_conv_kernel_dim", &config.linear_conv_kernel_dim},
      {"num_experts", &config.num_experts},
      {"experts_per_token", &config.experts_per_token},
  };
  for (const auto& [key, number] : numbers) *number = nb::cast<int>(values[key]);
  for (nb::handle type : nb::cast<nb::sequence>(values["layer_types"])) {
    config.attention_layers.push_back(std::string_view(nb::cast<const char*>(type)) ==
                                      "full_attention");
  }
  config.rms_norm_eps = nb::cast<float>(values["rms_norm_eps"]);
  config.rope_theta = nb::cast<float>(values["rope_theta"]);
  config.norm_topk_prob = nb::cast<bool>(values["norm_topk_prob"]);
  require(static_cast<size_t>(config.layers()) == checkpoint.experts.size(),
          "experts of every layer are needed");
  for (const ExpertsSpec& experts : checkpoint.experts) {
    require(experts_in(experts) == config.num_experts,
            "a layer has another number of experts than the config");
  }
  return config;
}

void bind_checkpoint(nb::module_& m) {
  nb::class_<Format>(m, "Format")
      .def(
          "__init__",
          [](Format* self, int rows, int cols, const char* dtype, int bits, int group) {
            new (self) Format{rows, cols, parse_dtype(dtype), bits, group};
          },
          "rows"_a, "cols"_a, "dtype"_a, "bits"_a = 0, "group"_a = 0);

  nb::class_<CheckpointSpec>(m, "Checkpoint")
      .def(
          "__init__",
          [](CheckpointSpec* self, const nb::sequence& files) {
            std::vector<std::string> paths;
            for (nb::handle file : files) paths.push_back(to_path(file));
            new (self) CheckpointSpec{std::move(paths), {}, {}, {}};
          },
          "files"_a)
      .def("add_matrix", add_matrix, "name"_a, "format"_a, "parts"_a)
      .def("add_vector", add_vector, "name"_a, "length"_a, "dtype"_a, "extents"_a,
           "plus_one"_a = false)
      .def("add_experts", add_experts, "gate"_a, "up"_a, "down"_a, "extents"_a)
      .def("needs", needs, "config"_a, nb::kw_only(), "backend"_a = "cpu", "precision"_a = "int8",
           "threads"_a = 1, "cache_bytes"_a = 0, "chunk"_a = 256, "context"_a = 0);
}

}  // namespace flashmoe
