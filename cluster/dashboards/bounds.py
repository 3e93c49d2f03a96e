"""Where an answer is called bad, by a line in the dashboard and by an alert. Shares are between 0 and 1."""

# Of a step's time, what engines are at work at least. On-policy they rest while the learner updates: above this that
# is as it should be.
BUSY = 0.3
# Of a step's time, what the learner waits for rollouts at most.
WAITING = 0.8
# Of the run folder's file system, what is free at least.
DISK_FREE = 0.1
# Of completions, what the reward may give no verdict on.
NO_VERDICT = 0.01
# How far the mean importance weight of tokens may be from 1.
IMPORTANCE = 0.1
# Times the gap of two hours before.
GAP_GROWTH = 3
# Nats below which a gap is rounding, however much it grows.
SMALL_GAP = 1e-5
# Of the base's Pass@k, what the current policy keeps at least.
KEPT = 0.9
# Minutes without a step.
NO_STEP_MINUTES = 30
