// Loads a model and decodes a few tokens, for tools/sanitize.sh: exit status 0 if that worked, 1 if the library refused.

#include "llama.h"

#include <vector>

int main(int argc, char ** argv) {
    if (argc != 2) {
        return 2;
    }

    llama_backend_init();

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        llama_backend_free();
        return 1;
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx = 128;

    llama_context * ctx = llama_init_from_model(model, params);

    int res = ctx ? 0 : 1;
    for (int n_tokens : { 33, 1 }) {
        std::vector<llama_token> tokens(n_tokens, 1);
        res |= ctx && llama_decode(ctx, llama_batch_get_one(tokens.data(), n_tokens)) == 0 ? 0 : 1;
    }

    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();

    return res;
}
