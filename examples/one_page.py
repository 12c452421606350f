"""The whole method on one page, with numpy alone: python examples/one_page.py

A language model gives every token of its vocabulary a number, the logit, at each position of a text; softmax turns the
logits into the probabilities of the next token. Distillation trains a small model, the student, to give the
probabilities of a large one, the teacher. Names below: z = student's logits, y = teacher's logits, both [positions,
tokens]; q = softmax(z), p = softmax(y); t = the target, the teacher's most probable token, one per position.
"""

import numpy as np


# --- 1. From logits to probabilities; logarithms throughout, since probabilities may be tiny.
def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(log_a, log_b):
    """KL(a || b) = sum a log(a/b): 0 where a = b, else positive. One number per position."""
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


# --- 2. The two usual objectives: value per position, and gradient on the student's logits.
def forward_kl(z, y):
    """KL(p || q): the student must give probability wherever the teacher does."""
    log_q, log_p = log_softmax(z), log_softmax(y)
    return kl(log_p, log_q), np.exp(log_q) - np.exp(log_p)


def reverse_kl(z, y):
    """KL(q || p): the student must not give probability where the teacher does not."""
    log_q, log_p = log_softmax(z), log_softmax(y)
    value = kl(log_q, log_p)
    return value, np.exp(log_q) * (log_q - log_p - value[:, None])


# --- 3. Split at the target: the pair (t, all the rest), and the tail, which is the rest renormalised to sum to 1.
def split(logits, t):
    """Log-probabilities of the pair [positions, 2] and of the tail [positions, tokens - 1]."""
    at_target = np.arange(logits.shape[1]) == t[:, None]
    rest = logits[~at_target].reshape(len(logits), -1)
    log_sum = rest.max(-1) + np.log(np.exp(rest - rest.max(-1, keepdims=True)).sum(-1))
    return log_softmax(np.stack([logits[at_target], log_sum], -1)), log_softmax(rest)


def parts(z, y, t):
    """B = KL of the pairs, K = KL of the tails. Then KL(q || p) = B + (1 - q_t) K."""
    (pair_q, tail_q), (pair_p, tail_p) = split(z, t), split(y, t)
    return kl(pair_q, pair_p), kl(tail_q, tail_p)


# --- 4. DRKL, arXiv 2604.00223: the factor 1 - q_t of reverse KL makes the student raise q_t, whatever p_t is, to get
# rid of a tail that does not fit. So replace it by a constant gamma.
def drkl(z, y, gamma=0.5):
    """B + gamma K, and its gradient. D, the difference of log-odds, is 0 where q_t = p_t."""
    t = y.argmax(-1)
    (pair_q, tail_q), (pair_p, tail_p) = split(z, t), split(y, t)
    B, K = kl(pair_q, pair_p), kl(tail_q, tail_p)
    D = (pair_q[:, 0] - pair_q[:, 1]) - (pair_p[:, 0] - pair_p[:, 1])
    push = np.exp(pair_q[:, 0] + pair_q[:, 1]) * D  # q_t (1 - q_t) D, on the target's logit: no K in it
    tail_grad = np.exp(tail_q) * (gamma * (tail_q - tail_p - K[:, None]) - push[:, None])
    at_target = np.arange(z.shape[1]) == t[:, None]
    grad = np.empty_like(z)
    grad[at_target], grad[~at_target] = push, tail_grad.ravel()
    return B + gamma * K, grad


# --- 5. A student that samples. The simplest language model: the next token depends on the last one only, so a model is
# a table of logits with a row per last token. The student is too small for the teacher's table: it has one number for
# the target of each row, and a single row of numbers that all rows share for everything else.
def sample(table, length, rng):
    """A text that the model writes itself, token by token; returns what each token was predicted from."""
    tokens = [0]
    for _ in range(length):
        tokens.append(rng.choice(len(table), p=np.exp(log_softmax(table[tokens[-1]]))))
    return np.array(tokens[:-1])


def train(objective, teacher, steps=2000, learning_rate=0.3):
    """Distil on texts that the student writes; return its table."""
    rng = np.random.default_rng(1)
    at_target = np.eye(len(teacher))[teacher.argmax(-1)]  # 1 at each row's target, else 0
    own, shared = np.zeros((len(teacher), 1)), np.zeros(len(teacher))
    for _ in range(steps):
        student = own * at_target + shared
        rows = sample(student, 30, rng)
        _, grad = objective(student[rows], teacher[rows])  # one row per position of the text
        step = -learning_rate * grad  # gradient descent: downhill on each position's logits, hence on what they are of
        np.add.at(own, rows, (step * at_target[rows]).sum(-1, keepdims=True))
        shared += step.mean(0)
    return own * at_target + shared


def main():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(1, 6)) * 2, rng.normal(size=(1, 6)) * 2
    t = y.argmax(-1)
    (B, K), q_t = parts(z, y, t), np.exp(log_softmax(z))[0, t]
    print(f"Reverse KL is {reverse_kl(z, y)[0].item():.6f}, and B + (1 - q_t) K is {(B + (1 - q_t) * K).item():.6f}.")

    z, y = np.array([[1.0, 0.5, -1.5]]), np.array([[1.0, -1.5, 0.5]])  # q_t = p_t, but the tails are exchanged
    push, ours = (np.round(-objective(z, y)[1][0, 0], 3) + 0.0 for objective in (reverse_kl, drkl))
    print(f"Target matched, tail not: reverse KL pushes the target's logit by {push:+.3f}, DRKL by {ours:+.3f}.")

    teacher = rng.normal(size=(12, 12)) * 2
    log_p, at_target = log_softmax(teacher), (range(12), teacher.argmax(-1))
    print("\nThree students that can match q_t = p_t, but not the tails, after training on their own texts:")
    for objective in (forward_kl, reverse_kl, drkl):
        log_q = log_softmax(train(objective, teacher))
        gap = np.round((np.exp(log_q) - np.exp(log_p))[at_target].mean(), 3) + 0.0
        entropy = -(np.exp(log_q) * log_q).sum(-1).mean()
        print(f"  {objective.__name__:<11} q_t - p_t = {gap:+.3f}   entropy {entropy:.2f}")
    print(f"  {'teacher':<11} q_t - p_t = +0.000   entropy {-(np.exp(log_p) * log_p).sum(-1).mean():.2f}")


if __name__ == "__main__":
    main()
