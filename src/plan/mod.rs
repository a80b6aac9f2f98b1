//! Pure: a spec and what is known of the world become a plan.
