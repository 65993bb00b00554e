#include "models/gpt_model.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "layers/cross_entropy.h"
#include "layers/finite_check.h"
#include "layers/offload.h"
#include "layers/recompute.h"
#include "mcore_bridge/error.h"
#include "models/context_share.h"
#include "models/fp8.h"
#include "parallel/collectives.h"
#include "parallel/zigzag.h"

namespace mcore_bridge {
namespace {

void check_layout(const ModelConfig& config, const ParallelState& parallel) {
  const auto& sizes = parallel.topology.sizes();
  auto same = [](const char* field, int64_t wanted, int actual) {
    MCB_CHECK(wanted == actual, "get_mcore_model: ", field, " is ", wanted,
              " in the config, but initialize_model_parallel made ", actual);
  };
  same("tensor_model_parallel_size", config.tensor_model_parallel_size, sizes.tensor);
  same("pipeline_model_parallel_size", config.pipeline_model_parallel_size, sizes.pipeline);
  // Chunks need no groups, so initialize_model_parallel need not know of them.
  if (sizes.virtual_pipeline > 1)
    same("virtual_pipeline_model_parallel_size", config.virtual_stages(), sizes.virtual_pipeline);
  same("context_parallel_size", config.context_parallel_size, sizes.context);
  if (!config.is_moe()) return;
  same("expert_model_parallel_size", config.expert_model_parallel_size, sizes.expert);
  same("expert_tensor_parallel_size", config.parallel_sizes().expert_tensor, sizes.expert_tensor);
}

at::Tensor default_positions(const ForwardInput& input, int64_t batch, int64_t length, c10::Device device) {
  const auto options = at::TensorOptions(device).dtype(at::kLong);
  const auto row = at::arange(length, options);
  if (!input.packed) return row.unsqueeze(0).expand({batch, length});
  // Position in the document: subtract the start of the document each token is in.
  const auto starts = input.packed->cu_seqlens.to(at::kLong);
  const auto document = at::bucketize(row, starts, /*out_int32=*/false, /*right=*/true) - 1;
  return (row - starts.index_select(0, document)).unsqueeze(0);
}

int64_t longest(const std::vector<int64_t>& ends) {
  int64_t result = 0;
  for (size_t i = 0; i + 1 < ends.size(); ++i) result = std::max(result, ends[i + 1] - ends[i]);
  return result;
}

/// Documents cut into pieces of at most `size` tokens.
PackedSeqParams in_chunks(const std::vector<int64_t>& ends, int64_t size, c10::Device device) {
  PackedSeqParams result;
  result.cu_seqlens_host = {0};
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    for (auto end = ends[i]; end < ends[i + 1];) {
      end = std::min(end + size, ends[i + 1]);
      result.cu_seqlens_host.push_back(end);
    }
  }
  result.cu_seqlens = at::tensor(result.cu_seqlens_host, at::kLong).to(at::kInt).to(device);
  result.max_seqlen = longest(result.cu_seqlens_host);
  return result;
}

}  // namespace

GPTModel::GPTModel(const ModelConfig& config, ParallelStatePtr parallel, int vp_stage, const std::string& device)
    : config_(config), parallel_(std::move(parallel)), vp_stage_(vp_stage), device_(device) {
  check_layout(config_, *parallel_);
  if (config_.deterministic_mode) at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  const int last_chunk = static_cast<int>(config_.virtual_stages()) - 1;
  place_.layers = config_.layers_of(parallel_->place.pp, vp_stage);
  place_.pre_process = parallel_->is_first_stage() && vp_stage == 0;
  place_.post_process = parallel_->is_last_stage() && vp_stage == last_chunk;
  place_.ep_rank = parallel_->ep.rank();
  place_.ep_size = parallel_->ep.size();

  const auto options = at::TensorOptions(device_).dtype(config_.params_dtype);
  const bool tied = share_embeddings_and_output_weights();
  const bool one_stage = place_.pre_process && place_.post_process;
  const VocabOptions vocab{.vocab_size = config_.padded_vocab_size,
                           .hidden_size = config_.hidden_size,
                           .sequence_parallel = config_.sequence_parallel,
                           .tied_over_stages = tied && !one_stage};
  if (place_.pre_process) embedding_ = std::make_unique<VocabParallelEmbedding>(vocab, parallel_, options);
  for (int64_t i = 0; i < place_.layers.count; ++i) {
    layers_.push_back(std::make_unique<TransformerLayer>(config_, parallel_, options, place_.layers.first + i));
    store_weights_in_fp8(config_, place_.layers.first + i, *layers_.back());
  }
  if (place_.post_process) {
    final_norm_ =
        std::make_unique<Norm>(NormOptions{.size = config_.hidden_size,
                                           .epsilon = config_.layernorm_epsilon,
                                           .zero_centered = config_.layernorm_zero_centered_gamma,
                                           .sum_over_tp = config_.sequence_parallel && parallel_->tp.size() > 1},
                               options);
    output_ = std::make_unique<OutputLayer>(vocab, parallel_, options, /*own_weight=*/!(tied && one_stage));
  }
  if (config_.position_embedding_type == "rope") rope_ = std::make_unique<RotaryEmbedding>(config_, device_);
  set_up_fp8(*this);
}

std::vector<Module::Child> GPTModel::children() const {
  std::vector<Child> result;
  if (embedding_) result.push_back({"embedding.word_embeddings", embedding_.get()});
  for (size_t i = 0; i < layers_.size(); ++i)
    result.push_back({"decoder.layers." + std::to_string(i), layers_[i].get()});
  if (final_norm_) result.push_back({"decoder.final_layernorm", final_norm_.get()});
  if (output_) result.push_back({"output_layer", output_.get()});
  return result;
}

AttentionInput GPTModel::attention_input(const ForwardInput& input) const {
  AttentionInput result;
  result.packed = input.packed;
  const auto& any = input.input_ids.defined() ? input.input_ids : input.labels;
  int64_t batch = 0, length = 0;
  if (any.defined()) {
    batch = any.size(0);
    length = any.size(1);
  } else {
    batch = input.hidden.size(1);
    length = input.hidden.size(0) * (config_.sequence_parallel ? parallel_->tp.size() : 1);
  }
  const auto& cp = parallel_->cp;
  const auto whole = length * cp.size();  // of the row all context-parallel ranks share
  if (input.packed && cudnn_attention_here(device_)) result.rows = std::make_shared<RaggedRows>(*input.packed, whole);
  const auto ends = input.packed ? input.packed->cu_seqlens_host : std::vector<int64_t>{0, whole};
  MCB_CHECK(!ends.empty() || !attention_reads_host_ends(config_, device_),
            "forward: cu_seqlens_host is empty, but attention of this model and device reads it");
  const auto window = config_.window_size.empty() ? -1 : config_.window_size[0];
  MCB_CHECK(ends.empty() || ends.back() == whole, "forward: cu_seqlens ends at ", ends.back(), ", but the row holds ",
            length, " tokens",
            cp.size() > 1 ? " on each of " + std::to_string(cp.size()) +
                                " context-parallel ranks; give every rank its part (split_cp_inputs) and cu_seqlens of "
                                "the whole row"
                          : "");
  if (cp.size() > 1) {
    check_zigzag(ends, cp.size(), "forward");
    result.context = context_plan(cp, parse_transport(config_.cp_comm_type), ends, window, device_);
  } else if (config_.softmax_type == "learnable") {
    result.context = context_plan(cp, Transport::kAllGather, ends, window, device_);
  }
  const bool chunks = config_.attention_chunk_size && longest(ends) > *config_.attention_chunk_size;
  MCB_CHECK(!chunks || cp.size() == 1, "forward: a document of ", longest(ends),
            " tokens is longer than "
            "attention_chunk_size ",
            *config_.attention_chunk_size, ", which context_parallel_size ", cp.size(),
            " does not support; use shorter documents or context_parallel_size 1");
  if (chunks && !input.attention_mask.defined())
    result.chunks = in_chunks(ends, *config_.attention_chunk_size, device_);
  at::Tensor places;  // in the row
  if (config_.attn_scale || (rope_ && !input.position_ids.defined())) {
    places = default_positions(input, batch, whole, device_);
    if (cp.size() > 1) places = zigzag_slice(places, 1, ends, cp.size(), cp.rank());
  }
  if (rope_) {
    const auto& positions = input.position_ids.defined() ? input.position_ids : places;
    MCB_CHECK(positions.dim() == 2 && positions.size(1) == length, "forward: position_ids is ", positions.sizes(),
              ", expected [", batch, ", ", length, "]", cp.size() > 1 ? ": this rank's part of the positions" : "");
    result.rope = rope_->table(positions, input.packed ? input.packed->max_seqlen : whole);
  }
  if (config_.attn_scale) {  // by the place in the row, as Transformers has it, whatever position_ids say
    const auto steps = ((places.t().to(at::kFloat) + 1) / config_.floor_scale).floor_();
    result.query_scale =
        (steps.log1p_() * *config_.attn_scale + 1).to(config_.params_dtype).unsqueeze(-1).unsqueeze(-1);
  }
  if (!input.attention_mask.defined()) return result;
  if (cp.size() > 1) {
    check_right_padding(input.attention_mask, "forward");  // causal attention never looks at padding on the right
    return result;
  }

  MCB_CHECK(!input.packed,
            "forward: attention_mask and packed_seq_params exclude each other; documents are kept apart by cu_seqlens");
  const auto& mask = input.attention_mask;
  if (mask.dim() == 2) {
    MCB_CHECK(mask.size(0) == batch && mask.size(1) == length, "forward: attention_mask is ", mask.sizes(),
              ", expected [", batch, ", ", length, "]");
    // Padding attends to itself so that no row is empty.
    const auto keys = mask.to(at::kBool).unsqueeze(1).unsqueeze(1).logical_or(
        at::eye(length, at::TensorOptions(device_).dtype(at::kBool)));
    const bool sinks = config_.softmax_type == "learnable";
    if (sinks && padded_on_the_right(mask)) return result;  // causal attention never looks there
    result.allowed = causal_mask(length, -1, device_).logical_and(keys);
    if (window >= 0) result.allowed_in_window = causal_mask(length, window, device_).logical_and(keys);
    if (config_.attention_chunk_size) {
      // Chunks count from the first token on.
      const auto chunk = (mask.ne(0).cumsum(1) - 1).clamp_min(0).floor_divide(*config_.attention_chunk_size);
      result.allowed_in_window = chunk.unsqueeze(2).eq(chunk.unsqueeze(1)).unsqueeze(1).logical_and_(result.allowed);
    }
  } else {
    MCB_CHECK(
        mask.dim() == 4 && mask.scalar_type() == at::kBool,
        "forward: attention_mask must be [b, s] (1 = token, 0 = padding) or bool [b, 1, s, s] (true = masked); found ",
        mask.sizes(), " of ", mask.scalar_type());
    result.allowed = mask.logical_not();
    if (window >= 0) result.allowed_in_window = result.allowed.logical_and(causal_mask(length, window, device_));
    if (config_.attention_chunk_size) {
      const auto chunk =
          at::arange(length, mask.options().dtype(at::kLong)).floor_divide(*config_.attention_chunk_size);
      result.allowed_in_window = result.allowed.logical_and(chunk.unsqueeze(1).eq(chunk.unsqueeze(0)));
    }
  }
  return result;
}

at::Tensor GPTModel::run_layers(at::Tensor x, const AttentionInput& attention, double loss_share) {
  const bool again = config_.recompute_granularity == "full" && at::GradMode::is_enabled();
  const bool block = config_.recompute_method == "block";
  const auto count = layers_.size(), given = static_cast<size_t>(config_.recompute_num_layers.value_or(1));
  const size_t unit = again && !block ? given : 1;
  const size_t recomputed = !again ? 0 : block ? std::min(given, count) : count;
  // With a frozen embedding nothing else would tell autograd that the layers hold trainable parameters.
  if (recomputed > 0 && !x.requires_grad()) x = x.detach().requires_grad_(true);
  const auto offloaded = config_.cpu_offloading && at::GradMode::is_enabled()
                             ? std::min(count, static_cast<size_t>(config_.cpu_offloading_num_layers))
                             : 0;
  std::shared_ptr<OffloadedBlock> before;
  for (size_t first = 0; first < count; first += unit) {
    if (first < offloaded) {
      ActivationOffload::Block block;
      x = run_unit(static_cast<int>(first) + 1, x,
                   [&](const at::Tensor& z) { return layers_[first]->forward(z, attention, loss_share); });
      if (x.requires_grad()) before = block.leave(x, before);
      continue;
    }
    const auto end = std::min(count, first + unit);
    auto run = [this, first, end, attention, loss_share](const at::Tensor& input) {
      auto y = input;
      for (size_t i = first; i < end; ++i) {
        const bool unused = recomputing() && i + 1 == end;
        y = run_unit(static_cast<int>(i) + 1, y,
                     [&](const at::Tensor& z) { return layers_[i]->forward(z, attention, loss_share, unused); });
        check_finite(y, "decoder.layers.", place_.layers.first + static_cast<int64_t>(i));
      }
      return y;
    };
    x = first < recomputed ? recompute(run, x) : run(x);
  }
  return x;
}

at::Tensor GPTModel::forward(const ForwardInput& input, bool gather_output) {
  at::Tensor x;
  if (embedding_) {
    MCB_CHECK(input.input_ids.defined() && input.input_ids.dim() == 2,
              "forward: input_ids [b, s] is needed on the first stage");
    MCB_CHECK(!input.packed || input.input_ids.size(0) == 1, "forward: a packed batch is one row, input_ids has ",
              input.input_ids.size(0));
    const auto tp = parallel_->tp.size();
    MCB_CHECK(!config_.sequence_parallel || input.input_ids.size(1) % tp == 0, "forward: with sequence_parallel the ",
              input.input_ids.size(1), " positions must divide by tensor_model_parallel_size ", tp, "; pad the batch");
    x = run_unit(unit_of("embedding."), {}, [&](const at::Tensor&) { return embedding_->forward(input.input_ids); });
    check_finite(x, "embedding.word_embeddings");
  } else {
    MCB_CHECK(input.hidden.defined(),
              "forward: this stage takes hidden states from the one before; call set_input_tensor");
    x = input.hidden;
  }
  const auto attention = attention_input(input);
  x = run_layers(std::move(x), attention, input.balance_loss_share);
  if (!output_) return x;

  return run_unit(unit_of("output_layer."), x, [&](const at::Tensor& hidden) {
    const auto normed = final_norm_->forward(hidden);
    check_finite(normed, "decoder.final_layernorm");
    const auto tied = embedding_ ? embedding_->weight() : at::Tensor();
    if (input.labels.defined() && input.loss_weight.defined()) {
      return linear_cross_entropy(normed, output_->weight(tied), input.labels.t(),
                                  {.vocab_size = config_.padded_vocab_size,
                                   .sequence_parallel = config_.sequence_parallel,
                                   .loss_weight = input.loss_weight},
                                  parallel_->tp);
    }
    const auto logits = output_->forward(normed, tied);
    check_finite(logits, "output_layer");
    if (input.labels.defined()) {  // logits: [s, b, local vocabulary]
      return vocab_parallel_cross_entropy(logits, input.labels.t(), config_.padded_vocab_size, parallel_->tp)
          .t()
          .contiguous();
    }
    const auto batch_first = logits.transpose(0, 1);
    if (!gather_output) return batch_first.contiguous();
    return gather_last_dim(batch_first, parallel_->tp).narrow(-1, 0, config_.padded_vocab_size).contiguous();
  });
}

int GPTModel::unit_of(const std::string& parameter) const {
  const std::string layers = "decoder.layers.";
  if (parameter.starts_with(layers)) return std::stoi(parameter.substr(layers.size())) + 1;
  const bool tied_here = place_.pre_process && place_.post_process && share_embeddings_and_output_weights();
  return parameter.starts_with("embedding.") && !tied_here ? 0 : units() - 1;
}

namespace {

/// All modules of one class below `root`, by dotted name.
template <class Layer, class Named>
std::vector<Named> modules_of(Module& root) {
  std::vector<Named> result;
  std::function<void(Module&, const std::string&)> visit = [&](Module& module, const std::string& prefix) {
    if (auto* layer = dynamic_cast<Layer*>(&module)) result.push_back({prefix, layer});
    for (const auto& child : module.children())
      visit(*child.module, prefix.empty() ? child.name : prefix + "." + child.name);
  };
  visit(root, "");
  return result;
}

}  // namespace

std::vector<GPTModel::NamedLinear> GPTModel::linears() { return modules_of<ParallelLinear, NamedLinear>(*this); }

void GPTModel::make_room_for_adapters() {
  for (const auto& linear : linears()) linear.layer->make_room();
}

std::vector<GPTModel::NamedGroupedLinear> GPTModel::grouped_linears() {
  return modules_of<GroupedParallelLinear, NamedGroupedLinear>(*this);
}

std::vector<Router*> GPTModel::routers() {
  std::vector<Router*> result;
  for (auto& layer : layers_) {
    if (layer->moe()) result.push_back(&layer->moe()->router());
  }
  return result;
}

std::shared_ptr<GPTModel> build_model(const ModelConfig& config, ParallelStatePtr parallel, int vp_stage,
                                      const std::string& device) {
  return std::make_shared<GPTModel>(config, std::move(parallel), vp_stage, device);
}

std::shared_ptr<GPTModel> build_model(const ModelConfig& config, const std::string& device) {
  return build_model(config, ParallelState::single(), 0, device);
}

at::Tensor forward(GPTModel& model, const ForwardInput& input, bool gather_output) {
  return model.forward(input, gather_output);
}

}  // namespace mcore_bridge
