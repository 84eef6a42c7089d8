#include "bindings/bindings.h"

NB_MODULE(_native, m) {
  flashmoe::bind_checkpoint(m);
  flashmoe::bind_engine(m);
  flashmoe::bind_quantize(m);
  flashmoe::bind_ops(m);
  flashmoe::bind_plans(m);
}
