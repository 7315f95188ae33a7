"""Does the policy learn: tasks whose best policy is computed, and problems that can be checked."""
