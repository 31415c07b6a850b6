"""Editing as a Markov decision process: the environment, one edit, and learning from many.

    EditRequest -> Rollout (passes, pending) -> commit; in training: reward -> Learner -> parameters

environment: the edited model. rollout: one edit until it holds. objective, reference: the reward.
training, segment, learner: streams that grow, and the optimiser. effects, options, candidates:
credit for single modules and whole choices. preserved: prompts that an edit is asked beside.
"""
