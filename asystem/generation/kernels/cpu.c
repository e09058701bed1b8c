/* A decode step of a dense float32 model on a CPU. `cpu.py` compiles it, fills in `Step` and calls `decode`.
 *
 * Arrays are row-major. A row whose sequence has ended has length 0 and stands still. Matrix products are those of the
 * BLAS that PyTorch brings. Oracles: `runner.EagerRunner`, `sampler.py`.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Threads cost microseconds to wake: only for work that takes longer. */
#define WORTH_THREADS (1 << 14)
#define MOST_HEAD 512 /* numbers of a head; `cpu.py` refuses more */

/* Fortran's SGEMM, column-major. */
typedef void (*Sgemm)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                      const int *, const float *, const int *, const float *, float *, const int *);

/* Weights [outputs, inputs] and the cache of one layer; NULL where the model has none. */
typedef struct {
    const float *attn_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *mlp_norm, *gate_up, *down;
    float *keys, *values; /* [blocks, kv_heads, block_size, head] */
} Layer;

/* Fields and their order are those of `cpu.py`. */
typedef struct {
    Sgemm sgemm;
    const Layer *layers;
    const float *embedding, *norm, *head_weight; /* [vocab, size], [size], [vocab, size] */
    const float *cosine, *sine;                  /* [positions, half] */
    int64_t num_layers, size, inner, q_heads, kv_heads, head, half, vocab, block_size;
    /* of the running batch, see `rows.Rows` */
    int64_t rows, longest, version, stopped, full, table_stride, stride;
    int64_t *drawn, *done, *last_token, *position;
    const int64_t *key, *limit, *heeds_stop, *table;
    const float *temperature;
    const uint8_t *stops; /* [vocab] */
    int32_t *tokens;
    float *logprobs;
    int32_t *versions;
    /* to write in, [rows, ...] */
    int64_t *lengths;
    float *x, *normed, *qkv, *attended, *gate_up, *gated, *logits;
    float eps;
} Step;

static float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* out = x / rms(x) * weight over n numbers; out may be x. */
static void rms_norm(const float *x, const float *restrict weight, float eps, float *out, int64_t n) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* out = RMSNorm of x: [rows, size]. */
static void rms_norm_rows(const float *x, const float *weight, float eps, float *out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) rms_norm(x + row * size, weight, eps, out + row * size, size);
}

/* out [rows, size] = silu(gate) * up of gate_up [rows, 2 size], the gate's half first. */
static void swiglu(const float *gate_up, float *out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const float *restrict gate = gate_up + row * 2 * size, *restrict up = gate + size;
        float *restrict here = out + row * size;
        for (int64_t i = 0; i < size; i++) here[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* Norm (weight may be NULL) and rotary of one head in place: halves are paired; what lies beyond them stays. */
static void turn(float *x, const float *weight, float eps, const float *restrict cosine, const float *restrict sine,
                 int64_t half, int64_t head) {
    if (weight) rms_norm(x, weight, eps, x, head);
    for (int64_t i = 0; i < half; i++) {
        float left = x[i], right = x[half + i];
        x[i] = left * cosine[i] - right * sine[i];
        x[half + i] = right * cosine[i] + left * sine[i];
    }
}

/* Attention of `group` query heads that share one KV head, over `length` tokens; scores: [group, length] to write in.
 * Inlined with a constant `head`, so that the loops over it become vector registers.
 */
static inline __attribute__((always_inline)) void attend_head(
    const float *query, const float *keys, const float *values, const int64_t *blocks, int64_t block_stride,
    int64_t block_size, int64_t length, int64_t group, const int64_t head, float *scores, float *out) {
    float scale = 1.0f / sqrtf((float)head), sum[MOST_HEAD];
    for (int64_t g = 0; g < group; g++)
        for (int64_t start = 0, b = 0; start < length; start += block_size, b++) {
            int64_t count = length - start < block_size ? length - start : block_size;
            const float *block = keys + blocks[b] * block_stride;
            for (int64_t t = 0; t < count; t++)
                scores[g * length + start + t] = dot(query + g * head, block + t * head, head) * scale;
        }
    for (int64_t g = 0; g < group; g++) {
        float *restrict row = scores + g * length;
        float most = row[0], total = 0.0f;
        for (int64_t t = 1; t < length; t++) most = row[t] > most ? row[t] : most;
        for (int64_t t = 0; t < length; t++) row[t] = expf(row[t] - most);
        for (int64_t t = 0; t < length; t++) total += row[t];
        for (int64_t i = 0; i < head; i++) sum[i] = 0.0f;
        for (int64_t start = 0, b = 0; start < length; start += block_size, b++) {
            int64_t count = length - start < block_size ? length - start : block_size;
            const float *block = values + blocks[b] * block_stride;
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < head; i++) sum[i] += row[start + t] * block[t * head + i];
        }
        for (int64_t i = 0; i < head; i++) out[g * head + i] = sum[i] / total;
    }
}

/* One layer's attention of one new token a row: norm and rotary of its heads, the cache write, attention over the cache.
 * s->qkv [rows, (q_heads + 2 kv_heads) head] -> s->attended [rows, q_heads head], zeros for rows that stand still.
 */
static void attend(const Step *s, const Layer *layer) {
    int64_t head = s->head, group = s->q_heads / s->kv_heads, width = (s->q_heads + 2 * s->kv_heads) * head;
    int64_t per_head = s->block_size * head, per_block = s->kv_heads * per_head;
#pragma omp parallel if (s->rows * s->longest * s->q_heads * head > WORTH_THREADS)
    {
        float *scores = malloc(sizeof(float) * group * s->longest);
#pragma omp for schedule(dynamic, 4)
        for (int64_t row = 0; row < s->rows; row++) {
            int64_t length = s->lengths[row], last = length - 1;
            float *here = s->qkv + row * width, *to = s->attended + row * s->q_heads * head;
            if (length == 0) {
                for (int64_t i = 0; i < s->q_heads * head; i++) to[i] = 0.0f;
                continue;
            }
            const int64_t *blocks = s->table + row * s->table_stride;
            for (int64_t h = 0; h < s->q_heads + s->kv_heads; h++)
                turn(here + h * head, h < s->q_heads ? layer->q_norm : layer->k_norm, s->eps, s->cosine + last * s->half,
                     s->sine + last * s->half, s->half, head);
            int64_t place = blocks[last / s->block_size] * per_block + last % s->block_size * head;
            for (int64_t h = 0; h < s->kv_heads; h++) {
                const float *k = here + (s->q_heads + h) * head, *v = k + s->kv_heads * head;
                for (int64_t i = 0; i < head; i++) {
                    layer->keys[place + h * per_head + i] = k[i];
                    layer->values[place + h * per_head + i] = v[i];
                }
#define ATTEND(size)                                                                                            \
    attend_head(here + h * group * head, layer->keys + h * per_head, layer->values + h * per_head, blocks, per_block, \
                s->block_size, length, group, size, scores, to + h * group * head)
                if (head == 32) ATTEND(32);
                else if (head == 64) ATTEND(64);
                else if (head == 128) ATTEND(128);
                else ATTEND(head);
            }
        }
        free(scores);
    }
}

/* `sampler.uniform`: SplitMix64's output number `counter` of the stream, in (0, 1). */
static double uniform(int64_t key, int64_t counter) {
    uint64_t x = (uint64_t)key + ((uint64_t)counter + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    return ((double)(x >> 14) + 0.5) * 0x1p-50;
}

/* Draws a token a row from s->logits, as `sampler.sample` does without truncation, and records it as `Rows.record`. */
static void draw(const Step *s) {
    int64_t vocab = s->vocab;
#pragma omp parallel if (s->rows * vocab > WORTH_THREADS)
    {
        float *weights = malloc(sizeof(float) * vocab);
#pragma omp for
        for (int64_t row = 0; row < s->rows; row++) {
            if (s->lengths[row] == 0) continue;
            const float *restrict here = s->logits + row * vocab;
            int is_greedy = s->temperature[row] == 0.0f;
            float divisor = is_greedy ? 1.0f : s->temperature[row], most = -INFINITY;
            int64_t token = vocab - 1; /* of a diverged model's NaN */
            for (int64_t i = 0; i < vocab; i++) most = here[i] > most ? here[i] : most;
            most /= divisor;
            double sum = 0.0;
            for (int64_t i = 0; i < vocab; i++) weights[i] = expf(here[i] / divisor - most);
            for (int64_t i = 0; i < vocab; i++) sum += (double)weights[i];
            if (is_greedy) {
                token = 0;
                for (int64_t i = 1; i < vocab; i++) token = here[i] > here[token] ? i : token;
            } else {
                double target = uniform(s->key[row], s->drawn[row]) * sum, cumulative = 0.0;
                for (int64_t i = 0; i < vocab; i++) {
                    cumulative += (double)weights[i];
                    if (cumulative > target) {
                        token = i;
                        break;
                    }
                }
            }
            int64_t place = row * s->stride + s->drawn[row];
            s->tokens[place] = (int32_t)token;
            s->logprobs[place] = here[token] / divisor - most - (float)log(sum);
            s->versions[place] = (int32_t)s->version;
            s->last_token[row] = token;
            s->position[row] += 1;
            s->drawn[row] += 1;
            s->done[row] = s->stops[token] && s->heeds_stop[row] ? s->stopped : s->drawn[row] >= s->limit[row] ? s->full : 0;
        }
        free(weights);
    }
}

/* to = x weight^T (+ bias, + what `to` holds if `adds`): x [rows, inner], weight [outer, inner], to [rows, outer]. */
static void project(const Step *s, const float *x, const float *weight, const float *bias, float *to, int64_t inner,
                    int64_t outer, int adds) {
    int n = (int)outer, m = (int)s->rows, k = (int)inner;
    float one = 1.0f, beta = adds || bias ? 1.0f : 0.0f;
    if (bias)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t i = 0; i < outer; i++) to[row * outer + i] = bias[i] + (adds ? to[row * outer + i] : 0.0f);
    s->sgemm("T", "N", &n, &m, &k, &one, weight, &k, x, &k, &beta, to, &n);
}

/* One token for each of the first `rows` rows. */
void decode(const Step *s) {
    int64_t size = s->size, attended = s->q_heads * s->head, qkv = attended + 2 * s->kv_heads * s->head;
    for (int64_t row = 0; row < s->rows; row++) {
        s->lengths[row] = s->done[row] ? 0 : s->position[row] + 1;
        memcpy(s->x + row * size, s->embedding + s->last_token[row] * size, sizeof(float) * size);
    }
    for (const Layer *layer = s->layers; layer < s->layers + s->num_layers; layer++) {
        rms_norm_rows(s->x, layer->attn_norm, s->eps, s->normed, s->rows, size);
        project(s, s->normed, layer->qkv, layer->qkv_bias, s->qkv, size, qkv, 0);
        attend(s, layer);
        project(s, s->attended, layer->o, NULL, s->x, attended, size, 1);
        rms_norm_rows(s->x, layer->mlp_norm, s->eps, s->normed, s->rows, size);
        project(s, s->normed, layer->gate_up, NULL, s->gate_up, size, 2 * s->inner, 0);
        swiglu(s->gate_up, s->gated, s->rows, s->inner);
        project(s, s->gated, layer->down, NULL, s->x, s->inner, size, 1);
    }
    rms_norm_rows(s->x, s->norm, s->eps, s->normed, s->rows, size);
    project(s, s->normed, s->head_weight, NULL, s->logits, size, s->vocab, 0);
    draw(s);
}
