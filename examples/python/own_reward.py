"""A reward function of your own: answers are the better, the more of the question's words they take up.

`python -m examples.python.own_reward BASE_MODEL PROMPTS.jsonl OUT`; a record has a `prompt`.
"""

import sys

from fedloom import Recipe, train


def stays_on_topic(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of each prompt's words that its completion has; two lists of texts in, a list of numbers out."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked, said = set(prompt.lower().split()), set(completion.lower().split())
        rewards.append(len(asked & said) / max(1, len(asked)))
    return rewards


def main(model: str, prompts: str, out: str) -> None:
    recipe = Recipe(
        model={"name_or_path": model},
        stage="grpo",
        rollout={"reward_function": f"{__file__}:stays_on_topic", "max_new_tokens": 8},
        data={"train": prompts},
        training={"max_steps": 2, "per_device_train_batch_size": 2},
        output=out,
    )
    summary = train(recipe, on_step=lambda step, steps: print(f"step {step} of {steps}"))
    print(f"mean reward: {summary.metrics['reward']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
